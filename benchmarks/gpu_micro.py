"""Parts of gpu.py that time a single component: the loss head, attention, collation."""

import statistics
import time
from typing import Any

import torch

from benchmarks.gpu_harness import (
    OBJECTIVE,
    OURS,
    PADDED,
    Deadline,
    Setting,
    median_seconds,
    real_lengths,
    rows_of,
    shuffled_batches,
    to_device,
)
from orpo_dist.model.attention.flex import flex_packed_attention
from orpo_dist.model.attention.kernels import KernelCase, _GatherKeys, candidates, trusted_kernel
from orpo_dist.model.attention.sequences import Scores, sdpa_attention
from orpo_dist.model.head.chunks import PairRows
from orpo_dist.model.head.fused_loss import default_chunk_rows, fused_orpo_loss
from orpo_dist.packing.lengths import PairLengths


def head(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """Time relative to the matmuls alone on the same rows (two with a frozen head, three with a trained one), and peak
    memory, by chunk size."""
    rows, width, vocabulary = (256, 64, 1000) if setting.tiny else (8192, 4096, 151936)
    pairs = [PairRows(rows // 32, rows // 16, rows // 32)] * 8  # an eighth of the rows each
    device, dtype = setting.device, setting.dtype
    hidden = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype) * width**-0.5
    targets = torch.randint(vocabulary, (rows,), device=device)
    ones = torch.ones(len(pairs), device=device)
    chunk = default_chunk_rows(vocabulary, device)
    bare = _bare_matmuls(setting, hidden, weight, min(chunk, rows))
    results = []
    for trained in (False, True):
        for size in sorted({chunk, *((64, 128) if setting.tiny else (256, 512, 1024, 2048, 4096))}):
            if deadline.left < 20:
                break

            def step(trained: bool = trained, size: int = size) -> None:
                h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)
                loss = fused_orpo_loss(h, w, targets, pairs, ones, OBJECTIVE, chunk_rows=size).loss
                torch.autograd.grad(loss, [h, w] if trained else [h])

            try:
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                seconds = median_seconds(setting, step)
            except setting.out_of_memory():
                results.append({"trained": trained, "chunk": size, "failed": "out of memory"})
                continue
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
            results.append(
                {
                    "trained": trained,
                    "chunk": size,
                    "default": size == chunk,
                    "seconds": seconds,
                    "over_bare": seconds / bare[3 if trained else 2],
                    "peak_allocated": peak,
                }
            )
    return {"rows": rows, "width": width, "vocabulary": vocabulary, "bare_seconds": bare, "results": results}


def _bare_matmuls(setting: Setting, hidden: torch.Tensor, weight: torch.Tensor, chunk: int) -> dict[int, float]:
    """Seconds of the logits' matmul with that of the rows' gradient, and with the weight's gradient as well, in chunks
    of the same size on buffers that are there."""
    logits = torch.empty(chunk, weight.shape[0], device=hidden.device, dtype=hidden.dtype).normal_()
    back = torch.empty(chunk, hidden.shape[1], device=hidden.device, dtype=hidden.dtype)
    gradient = torch.zeros_like(weight)

    def run(matmuls: int) -> None:
        for start in range(0, hidden.shape[0], chunk):
            x = hidden[start : start + chunk]
            n = x.shape[0]
            torch.mm(x, weight.t(), out=logits[:n])
            torch.mm(logits[:n], weight, out=back[:n])
            if matmuls == 3:
                torch.addmm(gradient, logits[:n].t(), x, out=gradient)

    return {2: median_seconds(setting, lambda: run(2)), 3: median_seconds(setting, lambda: run(3))}


def attention(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """Forward and backward of one 8B-shaped layer's attention on real lengths, by every kernel that passes its trial,
    and the gather of shared keys in it."""
    heads, key_heads, size = (4, 2, 16) if setting.tiny else (32, 8, 128)
    device = setting.device
    lengths = real_lengths(setting)
    rows = rows_of(lengths, 1000)
    results = []
    for count in (4, 8):
        batch = [rows[i] for i in shuffled_batches(lengths, 1, count)[0]]
        layout = to_device(OURS.collate(batch), device)["orpo_layout"]
        inputs = [
            torch.randn(1, n, layout.length, size, device=device, dtype=setting.dtype, requires_grad=True)
            for n in (heads, key_heads, key_heads)
        ]
        upstream = torch.randn(1, layout.length, heads, size, device=device, dtype=setting.dtype)
        scores = Scores(scale=size**-0.5)
        pair_lengths = [PairLengths(s.prompt, s.chosen, s.rejected) for s in layout.segments]
        flops = 12 * heads * size * sum(pair.query_keys for pair in pair_lengths)
        case = KernelCase.of(*inputs, layout, scores)
        trusted = trusted_kernel(case)
        named = {"sequence by sequence": sdpa_attention}
        if device.type == "cuda":
            named |= {candidate.name: candidate.kernel for candidate in candidates(case)}
            named["FlexAttention"] = flex_packed_attention
        for name, kernel in named.items():

            def step(kernel=kernel, inputs=inputs, layout=layout, scores=scores, upstream=upstream) -> None:
                torch.autograd.grad(kernel(*inputs, layout, scores), inputs, upstream)

            try:
                seconds = median_seconds(setting, step)
            except Exception as error:  # a candidate that fails its trial: the table says why
                results.append({"pairs": count, "kernel": name, "failed": str(error).strip().partition("\n")[0]})
                continue
            results.append(
                {
                    "pairs": count,
                    "tokens": layout.length,
                    "kernel": name,
                    "trusted": trusted is not None and trusted.name == name,
                    "seconds": seconds,
                    "flops_per_second": flops / seconds,
                }
            )
        keys = inputs[1][0].transpose(0, 1).detach().requires_grad_()
        weights = torch.randn(layout.key_index.shape[0], key_heads, size, device=device, dtype=setting.dtype)
        for name, gather in (
            ("gather of keys, ours", lambda keys=keys, layout=layout: _GatherKeys.apply(keys, layout)),
            ("gather of keys, index_select", lambda keys=keys, layout=layout: keys.index_select(0, layout.key_index)),
        ):
            seconds = median_seconds(
                setting, lambda gather=gather, keys=keys, weights=weights: torch.autograd.grad(gather(), keys, weights)
            )
            results.append({"pairs": count, "tokens": layout.length, "kernel": name, "seconds": 2 * seconds})
    return {"results": results}


def packing(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """Host time of collating a micro-batch and of bringing it to the device: with workers it overlaps the step."""
    lengths = real_lengths(setting)
    rows = rows_of(lengths, 1000)
    results = []
    for count in (4, 8, 32):
        batches = [[rows[i] for i in batch] for batch in shuffled_batches(lengths, 4, min(count, len(rows) // 4))]
        for trainer in (OURS, PADDED):
            times = []
            for batch in batches * 3:
                start = time.perf_counter()
                collated = trainer.collate(batch)
                middle = time.perf_counter()
                to_device(collated, setting.device)
                times.append((middle - start, time.perf_counter() - middle))
            results.append(
                {
                    "pairs": count,
                    "layout": trainer.name,
                    "collate_seconds": statistics.median(t[0] for t in times),
                    "transfer_seconds": statistics.median(t[1] for t in times),
                }
            )
    return {"results": results}
