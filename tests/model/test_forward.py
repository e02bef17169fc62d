"""The forward of a micro-batch in both layouts, against each other and without totals."""

import pickle

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from orpo_dist.errors import UserError
from orpo_dist.loss import Objective
from orpo_dist.model.forward import PairForward
from orpo_dist.model.packed.choose_layout import LayoutChoice, LayoutOptions
from orpo_dist.packing.padded import PaddedLayout
from tests.trainer_runs import pairs

ROWS = [{**row, "weight": 1.0, "index": index} for index, row in enumerate(pairs(3, 60))]
CPU = torch.device("cpu")


def chosen(model, **changes):
    defaults = dict(
        objective=Objective(),
        padding_free=True,
        prefix_sharing=True,
        verify_layout=True,
        loss_chunk_size=None,
        nll_scope="sequence",
        pad_token_id=0,
        max_length=None,
        compute_dtype=torch.float32,
    )
    layout = LayoutChoice(LayoutOptions(**{**defaults, **changes}))
    layout.choose(model, router_aux_loss_coef=0.0)
    return layout


def run(layout, model, totals=True, rows=ROWS):
    batch = layout.collator(rows)
    made = batch["orpo_layout"]
    if totals:
        made.tokens, made.pairs = made.counts().float().unbind()
    return PairForward(layout, Objective())(model, batch, CPU)


def test_packed_is_padded(tiny_llama):
    packed, padded = tiny_llama(64), tiny_llama(64)
    ours = run(chosen(packed), packed)
    theirs = run(chosen(padded, padding_free=False), padded)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    torch.testing.assert_close(ours.scores.chosen_logps, theirs.scores.chosen_logps)
    ours.loss.backward()
    theirs.loss.backward()
    for one, other in zip(packed.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def with_turns(tokens: list[int]) -> list[dict]:
    """The rows with turns that the model did not write, of these tokens, in both completions."""
    size = len(tokens)
    return [
        {
            **row,
            "chosen_ids": row["chosen_ids"] + tokens + [7, 8, *tokens, 9],
            "chosen_context": [len(row["chosen_ids"]), len(row["chosen_ids"]) + size,
                               len(row["chosen_ids"]) + size + 2, len(row["chosen_ids"]) + 2 * size + 2],
            "rejected_ids": [6, *tokens, *row["rejected_ids"]],
            "rejected_context": [1, 1 + size],
        }
        for row in ROWS
    ]  # fmt: skip


@pytest.mark.parametrize("nll_scope", ["sequence", "completion"])
@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_packed_is_padded_with_turns_that_are_not_scored(tiny_llama, prefix_sharing, nll_scope):
    packed, padded = tiny_llama(64), tiny_llama(64)
    rows, options = with_turns([11, 12, 13]), {"nll_scope": nll_scope}
    ours = run(chosen(packed, prefix_sharing=prefix_sharing, **options), packed, rows=rows)
    theirs = run(chosen(padded, padding_free=False, **options), padded, rows=rows)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    torch.testing.assert_close(ours.scores.chosen_logps, theirs.scores.chosen_logps)
    torch.testing.assert_close(ours.scores.rejected_logps, theirs.scores.rejected_logps)
    ours.loss.backward()
    theirs.loss.backward()
    for one, other in zip(packed.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    everything = [{**row, "chosen_context": [], "rejected_context": []} for row in rows]
    assert run(chosen(packed, **options), packed, rows=everything).loss.item() != pytest.approx(
        ours.loss.item(), rel=1e-3
    )


def test_without_totals_the_padded_layout_has_scores_alone(tiny_llama):
    model = tiny_llama(64)
    result = run(chosen(model, padding_free=False), model, totals=False)
    assert result.loss is None and result.scores.chosen_logps.shape == (3,)


def test_a_collator_reaches_workers_without_the_model(tiny_llama):
    layout = chosen(tiny_llama(64), padding_free=False)
    copy = pickle.loads(pickle.dumps(layout.collator))
    assert isinstance(copy(ROWS)["orpo_layout"], PaddedLayout)
    assert len(pickle.dumps(layout.collator)) < 5000


@pytest.mark.filterwarnings("ignore:.*falling back to its reference PyTorch implementation")
def test_a_layout_that_reaches_no_layer_is_an_error():
    """Mamba's model gives its layers no keywords; without the start-up check only the step itself can tell."""
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    layout = chosen(model, verify_layout=False)
    assert layout.is_packed
    with pytest.raises(UserError, match="No layer of MambaForCausalLM receives the packed layout"):
        run(layout, model)
