"""Which layout is chosen, and what the start-up check does about a wrong one."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from orpo_dist.errors import UserError
from orpo_dist.loss import Objective
from orpo_dist.model.attention.interface import PACKED_ATTENTION
from orpo_dist.model.packed import choose_layout
from orpo_dist.model.packed.asked_layout import LayoutOptions
from orpo_dist.model.packed.choose_layout import LayoutChoice
from orpo_dist.model.packed.verify import LayoutCheck
from orpo_dist.model.patches import undo_all
from orpo_dist.packing.split import SequencePlace


def choice(**changes):
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
    return LayoutChoice(LayoutOptions(**{**defaults, **changes}))


@pytest.mark.parametrize("changes", [{"padding_free": False}, {"trl_collator": len}])
def test_ranks_share_packed_rows_only(tiny_llama, changes):
    """Padded rows would be computed by each of them, and loss and gradients counted as often."""
    layout = choice(sequence=SequencePlace(2, 0), **changes)
    with pytest.raises(UserError, match="sequence_parallel_size needs the packed layout"):
        layout.choose(tiny_llama(64), router_aux_loss_coef=0.0)


def test_ranks_share_no_rows_of_a_model_that_falls_back(tiny_llama, monkeypatch):
    layout, model = choice(sequence=SequencePlace(2, 0)), tiny_llama(64)
    layout.choose(model, router_aux_loss_coef=0.0)
    monkeypatch.setattr(choose_layout, "verify_layout", lambda *args, **options: LayoutCheck(1.0, 0.1, "wrong"))
    with pytest.raises(UserError, match=r"this run has the padded one: wrong\. Set sequence_parallel_size=1"):
        layout.verify(model)


@pytest.mark.parametrize(
    ("changes", "packed", "shares", "said"),
    [
        ({}, True, True, ""),
        ({"prefix_sharing": False}, True, False, ""),
        ({"padding_free": False}, False, False, "prefix_sharing has no effect with padding_free=false"),
        ({"trl_collator": len}, False, False, "A data_collator was given: padded layout"),
    ],
)
def test_what_was_asked_for_decides(tiny_llama, caplog, changes, packed, shares, said):
    layout = choice(**changes)
    layout.choose(tiny_llama(64), router_aux_loss_coef=0.0)
    assert (layout.is_packed, layout.prefix_sharing) == (packed, shares)
    assert said in caplog.text


def test_an_encoder_decoder_model_takes_the_padded_layout(caplog):
    small = dict(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    layout = choice()
    layout.choose(T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)), router_aux_loss_coef=0.0)
    assert not layout.is_packed and "Padded layout: T5ForConditionalGeneration" in caplog.text
    model = T5ForConditionalGeneration(T5Config(**small))
    model.config.decoder_start_token_id = None
    with pytest.raises(UserError, match="no decoder_start_token_id"):
        choice().choose(model, router_aux_loss_coef=0.0)
    with pytest.raises(UserError, match="data_collator cannot be replaced"):
        choice(trl_collator=len).choose(model, router_aux_loss_coef=0.0)


def test_a_failed_check_falls_back_once(tiny_llama, monkeypatch, caplog):
    checks = []

    def wrong(*args, **kwargs):
        checks.append(args)
        return LayoutCheck(1.0, 0.1, "hidden states differ")

    monkeypatch.setattr(choose_layout, "verify_layout", wrong)
    model = tiny_llama(64)
    before = model.config._attn_implementation
    layout = choice()
    layout.choose(model, router_aux_loss_coef=0.0)
    layout.verify(model)
    layout.verify(model)
    assert len(checks) == 1 and not layout.is_packed and "Padded layout: hidden states differ" in caplog.text
    assert model.config._attn_implementation == before


def test_a_failed_check_in_flight_is_an_error(tiny_llama, monkeypatch):
    monkeypatch.setattr(choose_layout, "verify_layout", lambda *a, **k: LayoutCheck(1.0, 0.1, "they differ"))
    model = tiny_llama(64)
    layout = choice()
    layout.choose(model, router_aux_loss_coef=0.0)
    with pytest.raises(UserError, match=r"they differ. Set padding_free=false"):
        layout.verify(model, may_fall_back=False)


def test_the_check_can_be_switched_off(tiny_llama, monkeypatch):
    monkeypatch.setattr(choose_layout, "verify_layout", lambda *a, **k: pytest.fail("asked"))
    model = tiny_llama(64)
    layout = choice(verify_layout=False)
    layout.choose(model, router_aux_loss_coef=0.0)
    layout.verify(model)
    assert layout.is_packed


def test_the_model_is_packed_in_force_alone(tiny_llama):
    model = tiny_llama(64)
    before, forward = model.config._attn_implementation, model.forward
    layout = choice()
    layout.choose(model, router_aux_loss_coef=0.0)
    assert layout.is_packed
    assert model.config._attn_implementation == before and model.forward == forward
    for _ in range(2):
        with layout.in_force(), layout.in_force():
            assert model.config._attn_implementation == PACKED_ATTENTION and model.forward != forward
        assert model.config._attn_implementation == before and model.forward == forward


def test_an_error_takes_it_off_too(tiny_llama):
    model = tiny_llama(64)
    layout = choice()
    layout.choose(model, router_aux_loss_coef=0.0)
    with pytest.raises(ZeroDivisionError), layout.in_force():
        1 / 0  # noqa: B018
    assert "forward" not in vars(model)


def test_moving_rotary_frequencies_are_fixed_when_asked(tiny_llama):
    model = tiny_llama(64)
    config = LlamaConfig(
        **{**model.config.to_dict(), "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
    )
    model = LlamaForCausalLM(config)
    before = model.model.rotary_emb.inv_freq.clone()
    layout = choice(max_length=8 * config.max_position_embeddings)
    layout.choose(model, router_aux_loss_coef=0.0)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    handles = layout.fix_rotary()
    assert handles and not torch.equal(model.model.rotary_emb.inv_freq, before)
    undo_all(handles)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
