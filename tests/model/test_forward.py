"""The forward of a micro-batch in both layouts, against each other, against full logits and without totals."""

import pickle

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MambaConfig, MambaForCausalLM

from orpo_dist.errors import UserError
from orpo_dist.loss import Objective
from orpo_dist.model.forward import PairForward
from orpo_dist.model.packed.asked_layout import LayoutOptions
from orpo_dist.model.packed.choose_layout import LayoutChoice
from orpo_dist.packing.padded import PaddedLayout
from tests.trainer_runs import pairs

ROWS = [{**row, "weight": 1.0, "index": index} for index, row in enumerate(pairs(3, 60))]
CPU = torch.device("cpu")
PLAIN = Objective()


def chosen(model, router_aux_loss_coef=0.0, **changes):
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
    layout.choose(model, router_aux_loss_coef=router_aux_loss_coef)
    return layout


def run(layout, model, totals=True, rows=ROWS, objective=PLAIN):
    batch = layout.collator(rows)
    made = batch["orpo_layout"]
    if totals:
        made.tokens, made.pairs = made.counts().float().unbind()
    return PairForward(layout, objective)(model, batch, CPU)


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


# ---------------------------------------------------------------- padded rows through the loss head

COMMON = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
SEQ2SEQ = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": t.LlamaConfig(**COMMON),
    "tied": t.LlamaConfig(**{**COMMON, "tie_word_embeddings": True}),
    "gemma2": t.Gemma2Config(**COMMON, final_logit_softcapping=1.5, query_pre_attn_scalar=8),
    "cohere": t.CohereConfig(**COMMON, logit_scale=0.25),
    "granite": t.GraniteConfig(**COMMON, logits_scaling=3.0),
    "bias": t.PhiConfig(**COMMON),
    "alibi": t.BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0),
    "mixture": t.Qwen3MoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "t5": t.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
        dropout_rate=0.0, tie_word_embeddings=True,
    ),
    "t5_gated": t.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
        dropout_rate=0.0, tie_word_embeddings=False, feed_forward_proj="gated-gelu",
    ),
    "bart": t.BartConfig(**SEQ2SEQ),
}  # fmt: skip
LORA = {
    "head": LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "lm_head"]),
    "saved_head": LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "body": LoraConfig(r=3, target_modules=["q_proj"]),
}
OBJECTIVE = Objective(beta=0.7, label_smoothing=0.1)
AUX = 0.3


def built(name, dtype=torch.float64):
    torch.manual_seed(0)
    config = CONFIGS[name]
    auto = t.AutoModelForSeq2SeqLM if config.is_encoder_decoder else t.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager", experts_implementation="eager").to(dtype).eval()
    with torch.no_grad():  # larger than initialised, so that scale and softcap matter
        model.get_output_embeddings().weight.mul_(10)
    return model


def with_lora(name, dtype=torch.float64):
    model = get_peft_model(built("llama"), LORA[name]).to(dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def loss_from_full_logits(model, layout, rows, aux=0.0):
    """The loss of padded rows in plain torch."""
    batch = layout.collator(rows)
    made = batch.pop("orpo_layout")
    outputs = model(**batch, use_cache=False, **({"output_router_logits": True} if aux else {}))
    logps = torch.log_softmax(outputs.logits, 2).gather(2, made.targets[..., None])[..., 0]
    means = (logps * made.completion).sum(1) / made.completion.sum(1)
    chosen, rejected = means.chunk(2)
    odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    likely = torch.nn.functional.logsigmoid
    smoothing = OBJECTIVE.label_smoothing
    preference = (1 - smoothing) * likely(odds) + smoothing * likely(-odds)
    tokens, pairs_ = made.nll.sum(), len(rows)
    loss = -(logps.chunk(2)[0] * made.nll).sum() / tokens - OBJECTIVE.beta * preference.sum() / pairs_
    if aux:
        loss = loss + aux * outputs.aux_loss
    return loss


def gradients_of(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_equals_full_logits(model, tolerance, rows=ROWS, aux=0.0, **options):
    layout = chosen(model, router_aux_loss_coef=aux, padding_free=False, objective=OBJECTIVE, **options)
    expected = loss_from_full_logits(model, layout, rows, aux)
    expected.backward()
    theirs = gradients_of(model)
    layout.verify(model)
    result = run(layout, model, rows=rows, objective=OBJECTIVE)
    result.loss.backward()
    ours = gradients_of(model)
    assert layout._head.head is not None and layout._head.checked and not result.loss.isnan()
    assert abs(result.loss.item() - expected.item()) <= tolerance * abs(expected.item())
    assert ours.keys() == theirs.keys() and theirs
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= tolerance * (1 + gradient.abs().max()), name
    return result


@pytest.mark.parametrize("nll_scope", ["sequence", "completion"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows_through_the_head_equal_full_logits(name, nll_scope):
    aux = AUX if name == "mixture" else 0.0
    tolerance = 1e-8 if aux else 1e-9  # the model computes its balancing loss in float32
    assert_equals_full_logits(built(name), tolerance, nll_scope=nll_scope, loss_chunk_size=7, aux=aux)


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows_through_the_head_equal_full_logits_in_float32(name):
    aux = AUX if name == "mixture" else 0.0
    assert_equals_full_logits(built(name, torch.float32), 1e-5, aux=aux)


@pytest.mark.parametrize("name", LORA)
def test_padded_rows_through_a_head_with_adapters(name):
    assert_equals_full_logits(with_lora(name), 1e-9, loss_chunk_size=7)


def test_padded_rows_with_turns_through_the_head():
    assert_equals_full_logits(built("llama"), 1e-9, rows=with_turns([11, 12, 13]), loss_chunk_size=5)


def as_by_trl(rows):
    """A collator of TRL's tokenised columns."""
    width = max(len(row[f"{side}_input_ids"]) for row in rows for side in ("chosen", "rejected"))
    pads = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        f"{side}_{kind}": torch.tensor(
            [[*row[f"{side}_{kind}"], *[pad] * (width - len(row[f"{side}_{kind}"]))] for row in rows]
        )
        for side in ("chosen", "rejected")
        for kind, pad in pads.items()
    }


@pytest.mark.parametrize("nll_scope", ["sequence", "completion"])
def test_rows_of_trls_collator_through_the_head(nll_scope):
    assert_equals_full_logits(built("llama"), 1e-9, trl_collator=as_by_trl, nll_scope=nll_scope)


def test_labels_that_the_head_cannot_take_use_full_logits(caplog):
    """A collator whose labels score a token that its attention mask leaves out: in no NLL term."""

    def collator(rows):
        batch = as_by_trl(rows)
        batch["chosen_attention_mask"][0, len(rows[0]["chosen_input_ids"]) - 1] = 0
        return batch

    model = built("llama")
    layout = chosen(model, padding_free=False, trl_collator=collator, objective=OBJECTIVE)
    layout.verify(model)
    expected = loss_from_full_logits(model, layout, ROWS)
    assert layout.collator(ROWS)["orpo_layout"].rows is None
    for _ in range(2):
        result = run(layout, model, objective=OBJECTIVE)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert caplog.text.count("Full logits for some batches") == 1


@pytest.mark.parametrize("name", ["bias", "t5", "gemma2"])
def test_eight_padded_micro_batches_of_one_pair_are_one_of_eight(name):
    tolerance = 1e-6 if name == "gemma2" else 1e-8  # its norms compute in float32, and rotary tables are float32
    model, rows = built(name), [{**row, "weight": 1.0, "index": i} for i, row in enumerate(pairs(8, 60, seed=2))]
    layout = chosen(model, padding_free=False, loss_chunk_size=7)
    layout.verify(model)
    whole = run(layout, model, rows=rows).loss
    whole.backward()
    expected = gradients_of(model)
    totals = layout.collator(rows)["orpo_layout"].counts().float().unbind()
    total = 0.0
    for row in rows:
        batch = layout.collator([row])
        batch["orpo_layout"].tokens, batch["orpo_layout"].pairs = totals
        loss = PairForward(layout, PLAIN)(model, batch, CPU).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=tolerance)
    for parameter, gradient in gradients_of(model).items():
        assert (gradient - expected[parameter]).abs().max() <= tolerance * (1 + expected[parameter].abs().max())


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that an operation has returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("trains_head", [True, False])
def test_no_tensor_of_the_size_of_the_logits(name, trains_head):
    """Neither formed nor kept: at most a chunk of logits, beside the head's own weight and its gradient."""
    chunk, vocabulary = 8, 40_000
    model = built(name)
    model.resize_token_embeddings(vocabulary)
    model.requires_grad_(trains_head)
    next(p for n, p in model.named_parameters() if n.endswith(("down_proj.weight", "wo.weight"))).requires_grad_()
    layout = chosen(model, padding_free=False, loss_chunk_size=chunk)
    layout.verify(model)
    padded_rows = layout.collator(ROWS)["orpo_layout"].targets.numel()
    limit = max(chunk * vocabulary, model.get_output_embeddings().weight.numel())
    assert padded_rows * vocabulary > 4 * limit
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with Largest() as formed, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run(layout, model).loss.backward()
    assert max(kept) <= limit and formed.elements <= limit
    with Largest() as formed, torch.no_grad():
        run(layout, model, totals=False)
    assert formed.elements <= limit
