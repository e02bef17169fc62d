"""Varlen attention in plain torch: what the CUDA kernels promise, to test the layout maths on any machine."""

import torch


def reference_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, *, scale, window=None):
    """query (T, Hq, D), key and value (K, Hk, D) to (T, Hq, D). Sequence i has the queries and keys between its marks;
    the causal mask is aligned bottom-right; `window` tokens are seen, the query's own included."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        q = query[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        k = key[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].repeat_interleave(groups, 1)
        v = value[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].repeat_interleave(groups, 1)
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        for row in range(len(q)):
            last = len(k) - len(q) + row
            logits[:, row, last + 1 :] = -torch.inf
            if window is not None:
                logits[:, row, : max(0, last - window + 1)] = -torch.inf
        outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v))
    return torch.cat(outputs)


def reference_kernel(query, key, value, layout, scores):
    """reference_varlen as a varlen function of orpo_dist.model.attention.kernels."""
    marks = layout.cu_seqlens_q, layout.cu_seqlens_k
    return reference_varlen(query, key, value, *marks, scale=scores.scale, window=scores.window)
