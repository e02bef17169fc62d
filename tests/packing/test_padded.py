import pytest
import torch

from orpo_dist.packing.padded import EncoderDecoderCollator, PaddedCollator, score_padded

ROWS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2], "weight": 1.0, "index": 0},
    {"prompt_ids": [5], "chosen_ids": [4, 2], "rejected_ids": [3, 2], "weight": 1.0, "index": 1},
]


def crosses(rows):
    return [[c == "x" for c in row.split()] for row in rows]


def test_the_example_of_the_docstring():
    batch = PaddedCollator(pad_token_id=0, nll_scope="sequence")(ROWS)
    layout = batch["orpo_layout"]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2, 0], [5, 4, 2, 0, 0], [5, 6, 8, 9, 2], [5, 3, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert layout.targets.tolist() == [[6, 7, 2, 0, 0], [4, 2, 0, 0, 0], [6, 8, 9, 2, 0], [3, 2, 0, 0, 0]]
    assert layout.completion.tolist() == crosses([". x x . .", "x x . . .", ". x x x .", "x x . . ."])
    assert layout.nll.tolist() == crosses(["x x x . .", "x x . . ."])
    assert layout.counts().tolist() == [5, 2]


def test_nll_scope_completion_leaves_the_prompt_out():
    layout = PaddedCollator(pad_token_id=0, nll_scope="completion")(ROWS)["orpo_layout"]
    assert torch.equal(layout.nll, layout.completion[:2])
    assert layout.counts().tolist() == [4, 2]


def test_scores_by_hand():
    torch.manual_seed(0)
    layout = PaddedCollator(pad_token_id=0, nll_scope="sequence")(ROWS)["orpo_layout"]
    logits = torch.randn(4, 5, 10, dtype=torch.float64)
    logps = torch.log_softmax(logits, -1)
    scores = score_padded(logits, layout)
    torch.testing.assert_close(scores.chosen_logps[0], (logps[0, 1, 7] + logps[0, 2, 2]) / 2)
    torch.testing.assert_close(scores.rejected_logps[0], (logps[2, 1, 8] + logps[2, 2, 9] + logps[2, 3, 2]) / 3)
    torch.testing.assert_close(scores.nll_sum[1], -(logps[1, 0, 4] + logps[1, 1, 2]))
    torch.testing.assert_close(scores.rejected_logits[1], logits[3, :2].mean())
    assert scores.nll_tokens.tolist() == [3, 2]


def test_encoder_decoder_rows_are_not_shifted_twice():
    batch = EncoderDecoderCollator(pad_token_id=0, decoder_start_token_id=1)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6], [5, 0], [5, 6], [5, 0]]
    assert batch["decoder_input_ids"].tolist() == [[1, 7, 0], [1, 4, 0], [1, 8, 9], [1, 3, 0]]
    layout = batch["orpo_layout"]
    assert layout.targets.tolist() == [[7, 2, 0], [4, 2, 0], [8, 9, 2], [3, 2, 0]]
    assert layout.counts().tolist() == [4, 2]


# The second pair's chosen completion: an answer, a turn of the user, an answer.
TURNS = [
    ROWS[0],
    {"prompt_ids": [5, 1], "chosen_ids": [4, 2, 8, 8, 9, 3], "chosen_context": [2, 4], "rejected_ids": [3, 7, 2],
     "rejected_context": [1, 2], "weight": 1.0, "index": 1},
]  # fmt: skip


def test_turns_that_the_model_did_not_write_are_not_scored():
    layout = PaddedCollator(pad_token_id=0, nll_scope="sequence")(TURNS)["orpo_layout"]
    assert layout.completion.tolist()[1::2] == crosses([". x x . . x x .", ". x . x . . . ."])
    assert layout.nll.tolist() == crosses(["x x x . . . . .", "x x x . . x x ."])
    assert layout.counts().tolist() == [3 + 5, 2]
    layout = EncoderDecoderCollator(pad_token_id=0, decoder_start_token_id=1)(TURNS)["orpo_layout"]
    assert layout.completion.tolist() == crosses(["x x . . . .", "x x . . x x", "x x x . . .", "x . x . . ."])
    assert layout.counts().tolist() == [2 + 4, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scoring_keeps_the_logits_alone(dtype):
    layout = PaddedCollator(0, "sequence")(ROWS)["orpo_layout"]
    shape = (*layout.targets.shape, 50)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    logits.requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores = score_padded(logits * 1, layout)
    assert sum(kept.values()) < 1.3 * logits.numel() * logits.element_size()
    total = scores.chosen_logps.sum() - 2 * scores.rejected_logps.sum() + scores.nll_sum.sum()
    (found,) = torch.autograd.grad(total, logits)

    exact = logits.detach().double().requires_grad_()
    logps = torch.log_softmax(exact, 2).gather(2, layout.targets[..., None])[..., 0]
    means = (logps * layout.completion).sum(1) / layout.completion.sum(1)
    pairs = len(layout.weight)
    expected = means[:pairs].sum() - 2 * means[pairs:].sum() - (logps[:pairs] * layout.nll).sum()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(expected, exact)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert (found.double() - gradient).abs().max() <= tolerance * gradient.abs().max()
