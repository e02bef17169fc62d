"""FlexAttention in plain torch, with gradients, which torch's own lacks on a CPU: to test masks and sinks anywhere."""

import torch
from torch.nn.attention.flex_attention import AuxOutput


def dense_mask(block_mask, mask_mod=None):
    """(T, T) bool: mask_mod of every entry in the partial blocks, everything in the full ones, nothing elsewhere. What
    a kernel sees, so wrong blocks show as much as a wrong mask_mod."""
    queries, keys = block_mask.seq_lengths
    size = block_mask.BLOCK_SIZE[0]
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    every = torch.arange(max(queries, keys))
    for numbers, columns, full in (
        (block_mask.kv_num_blocks, block_mask.kv_indices, False),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
    ):
        for row in range(numbers.shape[-1]):
            for column in columns[0, 0, row, : numbers[0, 0, row]].tolist():
                q = every[row * size : (row + 1) * size][: max(0, queries - row * size)]
                k = every[column * size : (column + 1) * size][: max(0, keys - column * size)]
                block = torch.ones(len(q), len(k), dtype=torch.bool)
                if not full:
                    block = block_mask.mask_mod(0, 0, q[:, None], k[None])
                assert not seen[q[0] : q[-1] + 1, k[0] : k[-1] + 1].any(), "a block is listed twice"
                seen[q[0] : q[-1] + 1, k[0] : k[-1] + 1] = block
    return seen


def reference_flex(query, key, value, *, score_mod, block_mask, scale, enable_gqa, return_aux):
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa or groups == 1
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scale
    if score_mod is not None:
        scores = score_mod(scores, None, None, None, None)
    scores = scores.masked_fill(~dense_mask(block_mask), -torch.inf)
    output = scores.softmax(-1) @ value
    return output if return_aux is None else (output, AuxOutput(lse=scores.logsumexp(-1)))
