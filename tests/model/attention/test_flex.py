"""FlexAttention's masks against the definition, entry by entry; its compiled forward; sinks by their formula."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from orpo_dist.model.attention import flex as attention_flex
from orpo_dist.model.attention.flex import block_mask, flex_packed_attention, visible_keys, with_sinks
from orpo_dist.model.attention.sequences import Scores, explicit_attention
from tests.model.attention.cases import assert_same, make
from tests.model.attention.flex_reference import dense_mask, reference_flex

LENGTHS = (
    ((11, 7, 9), (5, 6, 3), (1, 1, 4), (8, 10, 1)),  # one block
    ((150, 70, 131), (1, 1, 1), (40, 300, 5)),  # several, none of them aligned
    ((128, 128, 128), (256, 128, 128)),  # every part ends with a block
)


def definition(layout, window):
    """(T, T) bool by a loop over the tokens: own pair, own branch or the prompt, not after the query's position."""
    tokens = []
    for pair, s in enumerate(layout.segments):
        parts = [(0, 0, s.prompt), (1, s.prompt, s.chosen), (2, s.prompt, s.rejected)]
        if not layout.shared:
            parts = [(1, 0, s.prompt + s.chosen), (2, 0, s.prompt + s.rejected)]
        tokens += [(pair, branch, start + i) for branch, start, length in parts for i in range(length)]
    return torch.tensor(
        [
            [
                p == p2 and b2 in (0, b) and i2 <= i and (window is None or i - i2 < window)
                for p2, b2, i2 in tokens
            ]
            for p, b, i in tokens
        ]
    )  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 6, 100, 129])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sharing", [True, False])
def test_every_entry_of_the_mask(lengths, sharing, window):
    layout, *_ = make(sharing, lengths=lengths)
    expected = definition(layout, window)
    row = torch.arange(layout.length)
    mask = block_mask(layout, window)
    assert torch.equal(mask.mask_mod(0, 0, row[:, None], row[None]), expected)
    assert torch.equal(dense_mask(mask), expected)


def numbered_blocks(layout):
    """Two stretches that touch, a gap, one more; in a short prompt one that begins with it."""
    numbers = torch.full((sum(s.prompt for s in layout.segments),), -1)
    start = 0
    for s in layout.segments:
        for number, (first, last) in enumerate(((0, 0.2), (0.2, 0.5), (0.7, 0.9))):
            numbers[start + int(first * s.prompt) : start + int(last * s.prompt)] = number
        start += s.prompt
    return numbers


@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sharing", [True, False])
def test_every_entry_of_the_mask_with_prompt_blocks(lengths, sharing, window):
    layout, *_ = make(sharing, lengths=lengths)
    expected = definition(layout, window)
    layout.prompt_blocks = numbered_blocks(layout)
    for s, numbers in zip(
        layout.segments, layout.prompt_blocks.split([s.prompt for s in layout.segments]), strict=True
    ):
        same = (numbers[:, None] == numbers) & (numbers >= 0)
        for start in (s.start,) if layout.shared else (s.start, s.rejected_start - s.prompt):
            prompt = slice(start, start + s.prompt)
            expected[prompt, prompt] |= same
    assert torch.equal(dense_mask(block_mask(layout, window)), expected)


def test_full_blocks_are_not_masked_and_empty_ones_not_visited():
    layout, *_ = make(lengths=LENGTHS[2])
    mask = block_mask(layout, None)
    # [P C R] of 128 each, then P of two blocks, C, R: a block sees itself in part, the blocks of its prompt in full.
    assert mask.kv_num_blocks.flatten().tolist() == [1] * 7
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 1, 0, 1, 2, 2]


def test_a_mask_is_made_once_per_window_and_goes_with_the_device():
    layout, *_ = make()
    assert block_mask(layout, None) is block_mask(layout, None)
    assert block_mask(layout, 6) is not block_mask(layout, None)
    layout.to("cpu")
    assert layout.block_masks == {}


def test_intervals_beyond_the_row_are_empty():
    visible = visible_keys(make()[0], None)
    assert visible.own_start.shape == (128,)
    beyond = slice(make()[0].length, None)
    assert not (visible.own_stop[beyond] > visible.own_start[beyond]).any()
    assert not (visible.prompt_stop[beyond] > visible.prompt_start[beyond]).any()


@pytest.mark.parametrize(
    "softcap, sinks, window", [(None, False, None), (2.0, False, 6), (None, True, 6), (2.0, True, 1)]
)
@pytest.mark.parametrize("sharing", [True, False])
def test_values_and_gradients(monkeypatch, sharing, softcap, sinks, window):
    """Everything but torch's kernel itself, in float64: the sinks' gradients come through the log-sum-exp."""
    monkeypatch.setattr(attention_flex, "_compiled_flex", lambda: reference_flex)
    layout, *inputs = make(sharing)
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    scores = Scores(scale=0.7, window=window, softcap=softcap, sinks=sink if sinks else None)
    assert_same(lambda q, k, v: flex_packed_attention(q, k, v, layout, scores), inputs, scores, layout)
    layout.block_masks, layout.prompt_blocks = {}, numbered_blocks(layout)
    ours, theirs = (f(*inputs, layout, scores) for f in (flex_packed_attention, explicit_attention))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_huge_sink_takes_everything_and_an_absent_one_nothing():
    output, lse = torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3)
    result = with_sinks(output, lse, torch.tensor([1e4, -1e4]))
    assert torch.equal(result[:, 0], torch.zeros(1, 3, 4)) and torch.equal(result[:, 1], torch.ones(1, 3, 4))


SCORES = [(None, False), (2.0, False), (None, True)]


def assert_compiled_equals_explicit(layout, inputs, scores):
    with torch.no_grad():  # FlexAttention has no backward on a CPU
        ours = flex_packed_attention(*(x.detach() for x in inputs), layout, scores)
        expected = explicit_attention(*inputs, layout, scores)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap, sinks", SCORES)
def test_rows_and_masks_of_other_micro_batches_compile_once_more(monkeypatch, softcap, sinks):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, backend=counter)
    monkeypatch.setattr(attention_flex, "_compiled_flex", lambda: compiled)
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0]) if sinks else None
    for lengths in (*LENGTHS, ((30, 40, 50),), ((200, 3, 300), (7, 7, 7))):
        for window in (None, 6, 33):
            layout, *inputs = make(dtype=torch.float32, size=16, lengths=lengths)
            assert_compiled_equals_explicit(layout, inputs, Scores(0.7, window, softcap, sink))
    assert counter.frame_count <= 3


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_compiled_kernel(monkeypatch, softcap):
    """torch's own kernel, compiled for this CPU. Without sinks, since it returns no log-sum-exp there, and static: with
    dynamic shapes its C++ does not compile (torch 2.13)."""
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    monkeypatch.setattr(attention_flex, "_compiled_flex", lambda: compiled)
    for window in (None, 33):
        layout, *inputs = make(dtype=torch.float32, size=16, lengths=LENGTHS[1])
        assert_compiled_equals_explicit(layout, inputs, Scores(0.7, window, softcap))
