"""The packed attention function as a layer calls it, against attention written out over the whole row."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from orpo_dist.model.attention.interface import packed_attention
from orpo_dist.model.attention.kernels import KernelCase, trusted_kernel
from orpo_dist.model.attention.sequences import Scores
from orpo_dist.packing.layout import PackedLayoutError
from tests.model.attention.cases import HEADS, SIZE, assert_same, gradients, make, whole_row


def test_interface_reads_the_keywords_of_a_layer():
    layout, *inputs = make()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    for keywords, scores in (
        ({}, Scores(SIZE**-0.5)),
        ({"scaling": 0.3, "sliding_window": 6}, Scores(0.3, window=6)),
        ({"scaling": 0.3, "sliding_window": 4096}, Scores(0.3)),
        ({"softcap": 2.0}, Scores(SIZE**-0.5, softcap=2.0)),
        ({"s_aux": sinks, "sliding_window": 6}, Scores(SIZE**-0.5, window=6, sinks=sinks)),
    ):

        def call(q, k, v, keywords=keywords):
            output, weights = packed_attention(nn.Identity(), q, k, v, None, orpo_layout=layout, **keywords)
            assert weights is None and output.is_contiguous()
            return output

        assert_same(call, inputs, scores, layout)


def test_dropout_is_applied():
    layout, *inputs = make()
    for keywords in ({}, {"softcap": 2.0}):
        call = {"orpo_layout": layout, "dropout": 0.5, **keywords}
        torch.manual_seed(0)
        first, _ = packed_attention(nn.Identity(), *inputs, None, **call)
        second, _ = packed_attention(nn.Identity(), *inputs, None, **call)
        assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"orpo_layout": None}, "received no orpo_layout"),
        ({"attention_mask": torch.ones(1)}, "received an attention mask"),
        ({"is_causal": False}, "is not causal"),
        ({"position_bias": torch.ones(1)}, "uses position_bias"),
        ({"query": torch.ones(2, HEADS, 5, SIZE)}, "received 2 x 5 queries"),
    ],
)
def test_what_it_cannot_honour_is_refused(keywords, message):
    layout, query, key, value = make()
    call = {"query": query, "key": key, "value": value, "attention_mask": None, "orpo_layout": layout, **keywords}
    with pytest.raises(PackedLayoutError, match=message):
        packed_attention(nn.Identity(), **call)


def test_autocast_brings_rotary_float32_to_one_dtype():
    layout, query, key, value = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = packed_attention(nn.Identity(), query, key, value.bfloat16(), None, orpo_layout=layout)
    assert output.dtype == torch.bfloat16


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("softcap, sinks", [(None, False), (20.0, False), (None, True)])
@pytest.mark.parametrize("sharing", [True, False])
def test_kernel_on_the_device(sharing, softcap, sinks, window, size):
    """Alignment and gradients of the trusted kernel, against the definition in float64."""
    lengths = ((11, 7, 9), (1, 1, 4), (300, 130, 65), (8, 10, 1))
    layout, *inputs = make(sharing, torch.bfloat16, "cuda", size, lengths)
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.bfloat16, device="cuda", requires_grad=True)
    scores = Scores(scale=size**-0.5, window=window, softcap=softcap, sinks=sink if sinks else None)
    trusted = trusted_kernel(KernelCase.of(*inputs, layout, scores))
    assert trusted is not None
    output = trusted.kernel(*inputs, layout, scores)
    exact = [x.detach().double().requires_grad_() for x in (*inputs, *([sink] if sinks else []))]
    expected = whole_row(*exact[:3], layout, replace(scores, sinks=exact[3] if sinks else None))
    inputs += [sink] if sinks else []
    pairs = [(output, expected), *zip(gradients(output, *inputs), gradients(expected, *exact), strict=True)]
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-2
        assert (ours.double() - theirs).abs().max() < 3e-2 * theirs.abs().max()
