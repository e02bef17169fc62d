"""Packed rows of attention inputs, and attention by its definition over the whole row to compare with."""

import torch

from orpo_dist.packing.collate import PackedCollator
from tests.model.packing_reference import rows

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def make(sharing=True, dtype=torch.float64, device="cpu", size=SIZE, lengths=None):
    options = {} if lengths is None else {"lengths": lengths}
    layout = PackedCollator(sharing, "sequence")(rows(**options))["orpo_layout"].to(device)
    generator = torch.Generator().manual_seed(0)

    def tensor(heads):
        values = torch.randn(1, heads, layout.length, size, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    return layout, tensor(HEADS), tensor(KEY_HEADS), tensor(KEY_HEADS)


def whole_row(query, key, value, layout, scores):
    """The definition, over all T x T scores: a token sees tokens of its own pair at or before its position, its own
    branch or the prompt."""
    pair, branch, position = [], [], []
    for i, s in enumerate(layout.segments):
        lengths = [s.prompt, s.chosen, s.rejected] if layout.shared else [0, s.prompt + s.chosen, s.prompt + s.rejected]
        for kind, length in enumerate(lengths):
            start = s.prompt if layout.shared and kind else 0
            pair += [i] * length
            branch += [kind] * length
            position += range(start, start + length)
    pair, branch, position = (torch.tensor(x, device=query.device) for x in (pair, branch, position))
    behind = position[:, None] - position
    sees = (pair[:, None] == pair) & (behind >= 0) & ((branch == 0) | (branch[:, None] == branch))
    if scores.window is not None:
        sees &= behind < scores.window
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    logits = query @ key.transpose(2, 3) * scores.scale
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    logits = logits.masked_fill(~sees, -torch.inf)
    if scores.sinks is not None:
        sinks = scores.sinks[None, :, None, None].expand(1, -1, layout.length, 1)
        logits = torch.cat([logits, sinks.to(logits.dtype)], 3)
    weights = logits.softmax(3)[..., : layout.length]
    return (weights @ value).transpose(1, 2)


def gradients(output, *inputs):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((output * weights.to(output)).sum(), inputs)


def assert_same(function, inputs, scores, layout, rtol=1e-10, atol=1e-10):
    extra = () if scores.sinks is None else (scores.sinks,)
    expected, output = whole_row(*inputs, layout, scores), function(*inputs)
    torch.testing.assert_close(output, expected, rtol=rtol, atol=atol)
    for ours, theirs in zip(gradients(output, *inputs, *extra), gradients(expected, *inputs, *extra), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
