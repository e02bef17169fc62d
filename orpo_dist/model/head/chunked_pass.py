"""One pass over the scored rows, chunk by chunk: scores, loss and gradients. What and why: fused_loss.py.

Shape legend: B pairs, N scored rows, n rows of a chunk, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orpo_dist.loss import Objective, PairScores, orpo_loss
from orpo_dist.model.head.chunks import CHOSEN, Chunk, PairRows, PairStarts, pair_starts, plan_chunks
from orpo_dist.packing.split import RowSplit


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output: times `scale` (Cohere, Granite), then softcap * tanh(x / softcap)
    (Gemma 2)."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass
class HeadJob:
    """What one call of `fused_orpo_loss` asks for, see there. `scores` is filled in by the pass."""

    targets: torch.Tensor
    pair_rows: list[PairRows]
    pair_weight: torch.Tensor
    objective: Objective
    transform: LogitTransform
    tokens: torch.Tensor | None
    pairs: torch.Tensor | None
    chunk_rows: int
    with_gradients: bool
    split: RowSplit | None = None
    scores: PairScores | None = None


class ChunkedPass:
    """One pass over the scored rows. `gradients` has one entry per term, None where none is needed; each is the
    gradient of tokens * loss."""

    def __init__(self, job: HeadJob, terms: Sequence[torch.Tensor], needed: list[bool], dtype: torch.dtype):
        hidden, weight = terms[0], terms[1]
        self.job, self.needed = job, needed
        self.wide = torch.promote_types(dtype, torch.float32)
        scale = job.transform.scale
        self.hidden = hidden.to(dtype) if scale == 1 else hidden.to(dtype) * scale
        self.weight = weight.to(dtype)
        # Adapters and bias are small: float32, regardless of the head's dtype.
        self.extra_hidden = [x.to(self.wide) * scale for x in terms[2::2]]
        self.extra_weights = [w.to(self.wide) for w in terms[3::2]]

        rows, vocabulary = hidden.shape[0], weight.shape[0]
        self.starts, self.plan = self._planned()
        longest = self._longest_chunk()
        self.logits = hidden.new_empty(longest, vocabulary, dtype=dtype)
        self.wide_logits = self.logits if dtype == self.wide else self.logits.to(self.wide)
        self.capped = None if job.transform.softcap is None else torch.empty_like(self.wide_logits)
        self.logps = hidden.new_empty(rows, dtype=self.wide)
        self.mean_logits = hidden.new_empty(rows, dtype=self.wide)

        self.pair_weight = job.pair_weight.to(self.wide)
        self.nll_tokens = hidden.new_empty(len(job.pair_rows), dtype=self.wide)
        for i, pair in enumerate(job.pair_rows):
            self.nll_tokens[i] = pair.nll_prompt + pair.chosen  # fills: no copy from the host, no sync
        self.tokens = (self.pair_weight * self.nll_tokens).sum() if job.tokens is None else job.tokens.to(self.wide)
        self.pairs = self.pair_weight.sum() if job.pairs is None else job.pairs.to(self.wide)

        # dLoss/dlogits of a row = factor * (softmax - onehot) / tokens
        self.factor = hidden.new_empty(rows, dtype=self.wide)
        for i, start in enumerate(self.starts):
            self.factor[start.prompt : start.rejected] = self.pair_weight[i]
        self.gradients = [
            term.new_zeros(term.shape, dtype=self.wide) if need else None
            for term, need in zip(terms, needed, strict=True)
        ]
        self.buffers: dict[int, list[torch.Tensor | None]] = {}
        self.filled: set[int] = set()

    def _planned(self) -> tuple[list[PairStarts], list[Chunk]]:
        return pair_starts(self.job.pair_rows), plan_chunks(self.job.pair_rows, self.job.chunk_rows)

    def _longest_chunk(self) -> int:
        return max(chunk.stop - chunk.start for chunk in self.plan)

    def run(self) -> torch.Tensor:
        """() loss of these pairs. Fills in `gradients` and the job's scores."""
        self._run_plan()
        scores = self._scores()
        self.job.scores = scores
        return orpo_loss(scores, self.job.objective, self.tokens, self.pairs)

    def _run_plan(self) -> None:
        for chunk in self.plan:
            rows = slice(chunk.start, chunk.stop)
            error = self._score(rows)
            if not any(self.needed):
                continue
            if chunk.open_branch is not None:
                self._form_gradients(rows, error, self._branch_buffer(chunk.open_branch), None, chunk.open_branch)
                continue
            if chunk.closes:
                self._find_factors(chunk.closes)
            self._form_gradients(rows, error, self.gradients[1::2], self.factor[rows], None)
            if chunk.closes and self.starts[chunk.closes[0]].chosen < chunk.start:
                self._scale_open_rows(self.starts[chunk.closes[0]], chunk.start)

    def _score(self, rows: slice) -> torch.Tensor:
        """Log-probabilities and mean logits of a chunk; returns (n, V) softmax - onehot (log-softmax when no gradient
        is asked for), times the derivative of the softcap."""
        n = rows.stop - rows.start
        logits = self.wide_logits[:n]
        torch.mm(self.hidden[rows], self.weight.t(), out=self.logits[:n])
        if self.logits is not self.wide_logits:
            logits.copy_(self.logits[:n])
        for x, w in zip(self.extra_hidden, self.extra_weights, strict=True):
            logits.addmm_(x[rows], w.t())
        softcap, tanh = self.job.transform.softcap, None
        if softcap is not None:
            assert self.capped is not None
            tanh = logits.div_(softcap).tanh_()
            logits = torch.mul(tanh, softcap, out=self.capped[:n])
        self.mean_logits[rows] = logits.mean(1)
        # In place: a second array of this size would cost more time in page faults than the log-softmax itself.
        error = torch.log_softmax(logits, 1, out=logits)
        target = self.job.targets[rows, None]
        logps = error.gather(1, target)
        self.logps[rows] = logps[:, 0]
        if any(self.needed):
            error.exp_().scatter_(1, target, torch.expm1(logps))
            if tanh is not None:
                error.mul_(tanh.square_().neg_().add_(1))
        return error

    def _form_gradients(
        self,
        rows: slice,
        error: torch.Tensor,
        weight_gradients: Sequence[torch.Tensor | None],
        factor: torch.Tensor | None,
        open_branch: int | None,
    ) -> None:
        """Adds the chunk's part to `weight_gradients` and writes that of its hidden rows; without `factor` both are
        unscaled."""
        beta = 0 if open_branch is not None and open_branch not in self.filled else 1
        if open_branch is not None:
            self.filled.add(open_branch)
        inputs = self.gradients[0::2]
        for x, w, into, weight_gradient in zip(
            self.extra_hidden, self.extra_weights, inputs[1:], weight_gradients[1:], strict=True
        ):
            if into is not None:
                _write_rows(into, rows, error, w, factor)
            if weight_gradient is not None:
                torch.addmm(weight_gradient, error.t(), _scaled(x[rows], factor), beta=beta, out=weight_gradient)
        narrow = error
        if self.logits is not self.wide_logits:
            narrow = self.logits[: error.shape[0]].copy_(error)
        if inputs[0] is not None:
            _write_rows(inputs[0], rows, narrow, self.weight, factor)
        if weight_gradients[0] is not None:
            x = self.hidden[rows]
            if narrow is error or error.device.type != "cuda":
                x = _scaled(x.to(self.wide), factor)
                torch.addmm(weight_gradients[0], error.t(), x, beta=beta, out=weight_gradients[0])
            else:  # half-precision operands, float32 sum: rounding each chunk's product would bias the gradient
                if x.dtype == torch.float16 and factor is not None:
                    # A memorised completion has a factor of 1e5 and an error of 1e-5: the product of factor and hidden
                    # rows exceeds float16's range, that of factor and error does not. bfloat16 has the range, and
                    # scaling the hidden rows reads less memory.
                    narrow.copy_(error.mul_(factor[:, None]))
                else:
                    x = _scaled(x.to(self.wide), factor).to(x.dtype)
                torch.addmm(weight_gradients[0], narrow.t(), x, beta=beta, out_dtype=self.wide, out=weight_gradients[0])

    def _branch_buffer(self, branch: int) -> list[torch.Tensor | None]:
        if branch not in self.buffers:
            self.buffers[branch] = [g if g is None else torch.empty_like(g) for g in self.gradients[1::2]]
        return self.buffers[branch]

    def _find_factors(self, closing: Sequence[int]) -> None:
        """Writes the factor of the completions' rows: d(tokens * loss)/d(log-probability) negated."""
        chosen, rejected = _branch_means(self.logps, [self.starts[i] for i in closing])
        by_chosen, by_rejected = self._by_means(closing, chosen, rejected)
        for k, i in enumerate(closing):
            s = self.starts[i]
            self._set_factors(i, by_chosen[k] / (s.rejected - s.chosen), by_rejected[k] / (s.end - s.rejected))

    def _by_means(
        self, pairs: Sequence[int], chosen: torch.Tensor, rejected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """d(tokens * loss)/d(mean log-probability) of both completions of these pairs, without the NLL term."""
        with torch.enable_grad():
            chosen, rejected = chosen.requires_grad_(), rejected.requires_grad_()
            nothing = torch.zeros_like(chosen)
            weight = torch.stack([self.pair_weight[i] for i in pairs])
            scores = PairScores(chosen, rejected, nothing, nothing, nothing, nothing, weight)
            loss = self.tokens * orpo_loss(scores, self.job.objective, self.tokens, self.pairs)
            by_chosen, by_rejected = torch.autograd.grad(loss, (chosen, rejected))
        return by_chosen, by_rejected

    def _set_factors(self, pair: int, by_chosen: torch.Tensor, by_rejected: torch.Tensor) -> None:
        s = self.starts[pair]
        self.factor[s.chosen : s.rejected] = self.pair_weight[pair] - by_chosen
        self.factor[s.rejected : s.end] = -by_rejected

    def _scale_open_rows(self, start: PairStarts, stop: int) -> None:
        """Scales the gradients of the open chunks of a pair, which end before row `stop`."""
        rows = slice(start.chosen, stop)
        for gradient in self.gradients[0::2]:
            if gradient is not None:
                gradient[rows] *= self.factor[rows, None]
        for branch in self.filled:
            factor = self.factor[start.chosen if branch == CHOSEN else start.rejected]
            for gradient, buffer in zip(self.gradients[1::2], self.buffers[branch], strict=True):
                if gradient is not None and buffer is not None:
                    gradient.addcmul_(buffer, factor)
        self.filled.clear()

    def _scores(self) -> PairScores:
        chosen_logps, rejected_logps = _branch_means(self.logps, self.starts)
        chosen_logits, rejected_logits = _branch_means(self.mean_logits, self.starts)
        return PairScores(
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            nll_sum=-torch.stack([self.logps[s.prompt : s.rejected].sum() for s in self.starts]),
            nll_tokens=self.nll_tokens,
            chosen_logits=chosen_logits,
            rejected_logits=rejected_logits,
            weight=self.pair_weight,
        )


def _branch_means(values: torch.Tensor, starts: Sequence[PairStarts]) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over the chosen and over the rejected rows of each pair."""
    chosen = torch.stack([values[s.chosen : s.rejected].mean() for s in starts])
    return chosen, torch.stack([values[s.rejected : s.end].mean() for s in starts])


def _scaled(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return x if factor is None else x * factor[:, None].to(x.dtype)


def _write_rows(
    into: torch.Tensor, rows: slice, error: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor | None
) -> None:
    if into.dtype == error.dtype:
        torch.mm(error, weight, out=into[rows])
    else:
        into[rows] = error @ weight
    if factor is not None:
        into[rows] *= factor[:, None]
