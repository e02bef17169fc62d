"""Attention sequence by sequence, against attention written out over the whole row."""

import pytest
import torch

from orpo_dist.model.attention import sequences as attention_sequences
from orpo_dist.model.attention.kernels import on_gathered_keys
from orpo_dist.model.attention.sequences import Scores, explicit_attention, sdpa_attention
from tests.model.attention.cases import HEADS, assert_same, make
from tests.model.attention.varlen_reference import reference_kernel


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("elements", [1, 20, 60])
def test_long_sequences_in_blocks_of_queries(monkeypatch, sharing, window, elements):
    monkeypatch.setattr(attention_sequences, "MASK_ELEMENTS", elements)
    layout, *inputs = make(sharing)
    scores = Scores(scale=0.7, window=window)
    assert_same(lambda q, k, v: sdpa_attention(q, k, v, layout, scores), inputs, scores, layout)
    assert all(queries * keys <= elements for queries, keys, _ in layout.visibility)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("sharing", [True, False])
def test_sdpa_and_varlen(sharing, window):
    layout, *inputs = make(sharing)
    scores = Scores(scale=0.7, window=window)
    assert_same(lambda q, k, v: sdpa_attention(q, k, v, layout, scores), inputs, scores, layout)
    kernel = on_gathered_keys(reference_kernel)
    assert_same(lambda q, k, v: kernel(q, k, v, layout, scores), inputs, scores, layout)


@pytest.mark.parametrize("block", [1024, 4], ids=["whole", "blocks"])
@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("softcap, sinks, window", [(2.0, False, None), (None, True, 6), (2.0, True, 6)])
def test_softcap_and_sinks(monkeypatch, softcap, sinks, window, sharing, block):
    monkeypatch.setattr(attention_sequences, "EXPLICIT_BLOCK", block)
    layout, *inputs = make(sharing)
    sink_logits = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    scores = Scores(scale=0.7, window=window, softcap=softcap, sinks=sink_logits if sinks else None)
    assert_same(lambda q, k, v: explicit_attention(q, k, v, layout, scores), inputs, scores, layout)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0}, {"sinks": True}])
def test_sequence_by_sequence_on_the_device(keywords):
    layout, *inputs = make(True, torch.float32, "cuda", 64)
    sinks = torch.linspace(-1, 1, HEADS, device="cuda", requires_grad=True) if keywords.get("sinks") else None
    scores = Scores(scale=0.125, window=6, softcap=keywords.get("softcap"), sinks=sinks)
    function = explicit_attention if keywords else sdpa_attention
    assert_same(lambda q, k, v: function(q, k, v, layout, scores), inputs, scores, layout, rtol=1e-3, atol=1e-4)
