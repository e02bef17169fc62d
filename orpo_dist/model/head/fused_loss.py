"""The ORPO loss of scored rows without their logits: chunk by chunk, gradients formed in the forward.

    chunk of rows -> logits (one matmul) -> log-probabilities and softmax error, in place
                  -> gradient of the hidden rows (second matmul) and of the head's weight (third)

The backward only scales these gradients. A row of the prompt has a coefficient that is known at once. A completion has
one, known when both completions of its pair have been scored:

- Completions that fit one chunk together are scored in one piece, so their coefficients are known before the gradients
  are formed. Several short pairs share a chunk.
- Longer ones are cut ("open" chunks). Their gradients are accumulated without the coefficient and scaled when the pair
  closes: the hidden rows in place, the weight's through one buffer per branch (chosen, rejected) of the weight's size.
  Scoring the rows twice instead costs a fourth matmul: at 576 x 49152 on a CPU core 0.34 ms per row against 30 ms per
  pair for the buffers, which win from 90 rows on.

Only one chunk of logits ever exists, so the memory beyond (N, H) and (V, H) does not depend on the completions' length.
Until the backward, gradients are kept in float32 and multiplied by `tokens`, the loss's denominator, so that the small
gradients of a large global batch do not underflow in half precision.

Shape legend: B pairs, N scored rows, n rows of a chunk, H hidden, V vocabulary, r rank of an adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from orpo_dist.loss import Objective, PairScores
from orpo_dist.model.head.chunked_pass import ChunkedPass, HeadJob, LogitTransform
from orpo_dist.model.head.chunks import PairRows
from orpo_dist.model.head.slice_pass import SlicePass
from orpo_dist.packing.split import RowSplit

CPU_CHUNK_ROWS = 512
ACCELERATOR_CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class Adapter:
    """A low-rank addition to the head, hidden (N, r) @ weight (V, r).T. Both sides get gradients."""

    hidden: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class FusedLoss:
    """loss: () share of these pairs in the loss of their global batch. scores: per pair, without gradients."""

    loss: torch.Tensor
    scores: PairScores


def default_chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose logits are formed at once, unless chunk_rows is set.

    CPU: 512. Time over that of the three bare matmuls (one core, 576 x 49152, pairs of 100/400/350): 1.37 with 128
    rows, 1.28 with 256, 1.19 with 512, 1.10 with 1024, whose logits take 200 MB.
    Elsewhere: 1 GiB of float32 logits, so that the completions of one pair usually fit, the matmuls are large and a
    trained head's float32 gradient is seldom read and written. Arithmetic, not measured: 8192 x 4096 x 152k in bfloat16
    hold 1.2 GiB of weight, 0.2 of rows and their gradient, 1.5 of logits, 2.3 of the weight's gradient: 5.2 GiB.
    """
    if device.type == "cpu":
        return CPU_CHUNK_ROWS
    return min(4096, max(CPU_CHUNK_ROWS, ACCELERATOR_CHUNK_BYTES // (4 * vocabulary)))


def fused_orpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    pair_rows: Sequence[PairRows],
    pair_weight: torch.Tensor,
    objective: Objective,
    *,
    bias: torch.Tensor | None = None,
    adapters: Sequence[Adapter] = (),
    transform: LogitTransform | None = None,
    tokens: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    chunk_rows: int | None = None,
    split: RowSplit | None = None,
) -> FusedLoss:
    """ORPO loss of B pairs from the hidden states of their scored rows.

    Args:
        hidden: (N, H) rows pair by pair, see PairRows.
        weight, bias: (V, H), (V,) the head. A frozen one costs no gradient and no third matmul.
        targets: (N,) token that each row predicts.
        pair_weight: (B,) 1, or 0 for a filler, which then adds exactly 0.
        tokens, pairs: () totals of the global batch; unset, those of these pairs alone.
        chunk_rows: rows whose logits exist at once.
        split: of a row that several ranks share. `hidden` and `targets` are then of the slice, `pair_rows` of the whole
            row, and the loss is this rank's share (model/head/slice_pass.py).

    Sums and statistics are float32 at least, matmuls in autocast's dtype, or in the weight's. With gradients disabled
    only the first matmul is done. The backward can run once.
    """
    terms = [hidden, weight]
    for adapter in adapters:
        terms += [adapter.hidden, adapter.weight]
    if bias is not None:
        terms += [hidden.new_ones(hidden.shape[0], 1), bias[:, None]]  # a bias is an adapter of rank 1 on ones
    job = HeadJob(
        targets,
        list(pair_rows),
        pair_weight,
        objective,
        transform or LogitTransform(),
        tokens,
        pairs,
        chunk_rows or default_chunk_rows(weight.shape[0], hidden.device),
        with_gradients=torch.is_grad_enabled(),
        split=split,
    )
    loss = _FusedORPO.apply(job, *terms)
    assert job.scores is not None
    return FusedLoss(loss, job.scores)


class _FusedORPO(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job: HeadJob, *terms: torch.Tensor) -> torch.Tensor:
        needed = [job.with_gradients and needs for needs in ctx.needs_input_grad[1:]]
        compute_dtype = _compute_dtype(terms[0], terms[1])
        with torch.autocast(terms[0].device.type, enabled=False):
            kind = ChunkedPass if job.split is None else SlicePass
            work = kind(job, terms, needed, compute_dtype)
            loss = work.run()
        # Kept on ctx rather than saved: the backward scales them in place and frees them.
        ctx.gradients, ctx.tokens, ctx.scale = work.gradients, work.tokens, job.transform.scale
        ctx.dtypes = [term.dtype for term in terms]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        if ctx.gradients is None:
            raise RuntimeError("The ORPO loss head frees its gradients in the backward: it can run only once.")
        unit = grad / ctx.tokens
        for place, gradient in enumerate(ctx.gradients):
            if gradient is not None:  # hidden rows (even places) were multiplied by the logit scale
                gradient.mul_(unit * ctx.scale if place % 2 == 0 else unit)
        results = [g if g is None else g.to(d) for g, d in zip(ctx.gradients, ctx.dtypes, strict=True)]
        ctx.gradients = None
        return None, *results


def _compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype
