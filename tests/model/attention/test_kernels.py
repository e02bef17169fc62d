"""Which kernel is trusted: by a trial that a wrong one fails, with each refusal in the log."""

import logging
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from orpo_dist.model.attention import kernels as attention_kernels
from orpo_dist.model.attention.kernels import (
    Candidate,
    KernelCase,
    candidates,
    first_that_passes,
    on_gathered_keys,
    trial_error,
    trusted_kernel,
)
from orpo_dist.model.attention.sequences import Scores, explicit_attention, sdpa_attention
from tests.model.attention.cases import gradients, make
from tests.model.attention.varlen_reference import reference_kernel, reference_varlen

CASE = KernelCase(torch.device("cpu"), torch.bfloat16, 4, 2, 16, 16, False, False, False, False, False)
RIGHT = Candidate("right", explicit_attention)


def fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """torch's signature from 2.12 on: window_size counts tokens to the left and right, (-1, 0) is causal."""
    assert (max_q, max_k) in {(220, 281), (281, 281)}
    assert enable_gqa or query.shape[1] == key.shape[1], "heads differ"
    left, right = window_size
    assert right == 0
    window = None if left == -1 else left + 1
    return reference_varlen(query, key, value, cu_seq_q, cu_seq_k, scale=scale, window=window)


def fake_varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.fixture
def varlen(monkeypatch):
    def use(function):
        monkeypatch.setattr(attention_kernels, "varlen_attn", function)
        attention_kernels._varlen_options.cache_clear()

    yield use
    attention_kernels._varlen_options.cache_clear()


@pytest.mark.parametrize("windowed", [False, True])
def test_arguments_of_the_torch_kernel(varlen, windowed):
    varlen(fake_varlen)
    kernel = on_gathered_keys(attention_kernels._torch_varlen)
    assert trial_error(kernel, replace(CASE, windowed=windowed)) < 1e-2


def test_torch_2_11_expands_keys_where_it_does_not_group_heads(varlen, caplog):
    varlen(fake_varlen_2_11)
    proposed = [c for c in candidates(CASE) if c.name.startswith("torch")]
    with caplog.at_level(logging.INFO):
        taken = first_that_passes(proposed, CASE)
    assert taken is not None and taken.name == "torch varlen on expanded keys"
    assert "torch varlen is not used for attention (bfloat16 on cpu, 4/2 heads of 16): AssertionError" in caplog.text


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize("windowed", [False, True])
def test_arguments_of_flash_attn(monkeypatch, module, windowed):
    """Keywords that versions 2 and 3 have in common: https://github.com/Dao-AILab/flash-attention,
    flash_attn/flash_attn_interface.py and hopper/flash_attn_interface.py."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        assert causal and softcap == 0.0 and window_size[1] == 0
        window = None if window_size[0] == -1 else window_size[0] + 1
        output = reference_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=softmax_scale, window=window)
        return (output, None) if module == "flash_attn_interface" else output

    fake = ModuleType(module)
    fake.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, module, fake)
    function = {"flash_attn": attention_kernels._flash_attn_2, "flash_attn_interface": attention_kernels._flash_attn_3}
    assert trial_error(on_gathered_keys(function[module]), replace(CASE, windowed=windowed)) < 1e-2


@pytest.mark.parametrize("extra", ["windowed", "softcap", "sinks", "prompt_blocks"])
def test_the_trial_passes_what_is_right(extra):
    assert trial_error(explicit_attention, replace(CASE, **{extra: True})) < 1e-2
    assert trial_error(explicit_attention, replace(CASE, dtype=torch.float16, **{extra: True})) < 2e-3


def top_left(query, key, value, layout, scores):
    """Causal masks aligned at the first key, as torch's own is_causal has them."""
    outputs = []
    for i in range(len(layout.cu_seqlens_q) - 1):
        q = query[layout.cu_seqlens_q[i] : layout.cu_seqlens_q[i + 1]].transpose(0, 1)
        k, v = (x[layout.cu_seqlens_k[i] : layout.cu_seqlens_k[i + 1]].transpose(0, 1) for x in (key, value))
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scores.scale, enable_gqa=True
            )
        )
    return torch.cat(outputs, 1).transpose(0, 1)


def off_by_one(query, key, value, layout, scores):
    return reference_kernel(query, key, value, layout, replace(scores, window=scores.window + 1))


def wrong_groups(query, key, value, layout, scores):
    return reference_kernel(query, key.flip(1), value.flip(1), layout, scores)


def no_gradient_of_keys(query, key, value, layout, scores):
    return reference_kernel(query, key.detach() + 0 * key, value, layout, scores)


def no_softcap(query, key, value, layout, scores):
    return explicit_attention(query, key, value, layout, replace(scores, softcap=None))


def sinks_without_gradient(query, key, value, layout, scores):
    return explicit_attention(
        query, key, value, layout, replace(scores, sinks=scores.sinks.detach() + 0 * scores.sinks)
    )


def causal_in_blocks(query, key, value, layout, scores):
    blocks, layout.prompt_blocks = layout.prompt_blocks, None
    output = explicit_attention(query, key, value, layout, scores)
    layout.prompt_blocks = blocks
    return output


def nan(query, key, value, layout, scores):
    return explicit_attention(query, key, value, layout, scores) * float("nan")


@pytest.mark.parametrize(
    "kernel, extra",
    [
        (on_gathered_keys(top_left), {}),
        (on_gathered_keys(off_by_one), {"windowed": True}),
        (on_gathered_keys(wrong_groups), {}),
        (on_gathered_keys(no_gradient_of_keys), {}),
        (no_softcap, {"softcap": True}),
        (sinks_without_gradient, {"sinks": True}),
        (causal_in_blocks, {"prompt_blocks": True}),
        (nan, {}),
    ],
)
def test_the_trial_fails_what_is_wrong(kernel, extra):
    assert trial_error(kernel, replace(CASE, **extra)) > 3 * attention_kernels.TRIAL_TOLERANCES[torch.bfloat16]


def test_refusals_are_in_the_log_and_the_next_candidate_is_tried(caplog):
    def broken(*args):
        raise RuntimeError("no kernel image\nwith details")

    proposed = [Candidate("broken", broken), Candidate("wrong", on_gathered_keys(top_left)), RIGHT]
    with caplog.at_level(logging.INFO):
        assert first_that_passes(proposed, CASE) is RIGHT
    told = "(bfloat16 on cpu, 4/2 heads of 16)"
    assert f"broken is not used for attention {told}: RuntimeError: no kernel image" in caplog.text
    assert f"wrong is not used for attention {told}: off by" in caplog.text
    assert f"Packed attention by right {told}" in caplog.text
    caplog.clear()
    assert first_that_passes(proposed[:2], CASE) is None
    assert "goes sequence by sequence" in caplog.text and caplog.records[-1].levelname == "WARNING"


def test_a_trial_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    trial_error(explicit_attention, CASE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "change, obstacle",
    [
        ({}, None),
        ({"dtype": torch.float32}, "bfloat16 or float16"),
        ({"dropout": True}, "no dropout"),
        ({"capability": (7, 5)}, "compute capability"),
    ],
)
def test_what_keeps_a_layer_from_the_kernels(monkeypatch, change, obstacle):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: change.get("capability", (9, 0)))
    case = replace(CASE, **{name: value for name, value in change.items() if name != "capability"})
    found = attention_kernels._obstacle(case)
    assert found is None if obstacle is None else obstacle in found


@pytest.mark.parametrize(
    "change, names",
    [
        ({}, ["flash-attn 3", "torch varlen", "torch varlen on expanded keys", "flash-attn 2", "FlexAttention"]),
        ({"key_heads": 4}, ["flash-attn 3", "torch varlen", "flash-attn 2", "FlexAttention"]),
        ({"softcap": True}, ["flash-attn 3", "flash-attn 2", "FlexAttention"]),
        ({"sinks": True}, ["FlexAttention"]),
        ({"prompt_blocks": True}, ["FlexAttention"]),
        ({"head_size": 320, "value_size": 320}, ["FlexAttention"]),
        ({"head_size": 36, "value_size": 36}, ["FlexAttention"]),
        ({"value_size": 8}, ["FlexAttention"]),
    ],
)
def test_which_kernels_are_tried(monkeypatch, change, names):
    monkeypatch.setattr(attention_kernels, "find_spec", lambda name: True)
    assert [candidate.name for candidate in candidates(replace(CASE, **change))] == names


def test_only_what_is_installed_is_tried(monkeypatch):
    monkeypatch.setattr(attention_kernels, "find_spec", lambda name: None)
    assert [c.name for c in candidates(CASE)] == ["torch varlen", "torch varlen on expanded keys"]


def test_no_kernel_on_a_cpu():
    layout, *inputs = make(dtype=torch.bfloat16)
    assert trusted_kernel(KernelCase.of(*inputs, layout, Scores(scale=1.0))) is None


def test_gathered_keys_have_the_gradient_of_plain_indexing():
    layout, query, key, value = make()
    scores = Scores(scale=0.7)
    plain = sdpa_attention(query, key, value, layout, scores)
    gathered = on_gathered_keys(reference_kernel)(query, key, value, layout, scores)
    for ours, theirs in zip(gradients(gathered, key, value), gradients(plain, key, value), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    rows = key[0].transpose(0, 1).detach().requires_grad_()
    ours = attention_kernels._GatherKeys.apply(rows, layout)
    theirs = rows[layout.key_index]
    weights = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (first,), (second,) = (torch.autograd.grad((x * weights).sum(), rows) for x in (ours, theirs))
    assert torch.equal(ours, theirs) and torch.equal(first, second)
