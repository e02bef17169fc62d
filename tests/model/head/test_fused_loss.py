"""The fused loss of scored rows against autograd, TRL's chunked log-probabilities, FLOP counter and allocator."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from orpo_dist.loss import Objective, PairScores, orpo_loss
from orpo_dist.model.head.chunked_pass import LogitTransform
from orpo_dist.model.head.chunks import PairRows, pair_starts, plan_chunks
from orpo_dist.model.head.fused_loss import Adapter, FusedLoss, fused_orpo_loss

HIDDEN, VOCABULARY = 16, 97
# Short and long prompts, completions of one token, completions longer than a small chunk, no prompt rows at all.
PAIRS = [PairRows(5, 7, 4), PairRows(0, 1, 1), PairRows(11, 2, 9), PairRows(0, 6, 3), PairRows(1, 1, 8)]
CHUNKS = [1, 3, 64, 1000]


@dataclass
class Problem:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    pairs: list[PairRows]
    pair_weight: torch.Tensor

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]


def problem(pairs=PAIRS, *, bias=False, dtype=torch.float64, hidden=HIDDEN, vocabulary=VOCABULARY, weights=None):
    torch.manual_seed(0)
    rows = sum(p.nll_prompt + p.chosen + p.rejected for p in pairs)
    return Problem(
        torch.randn(rows, hidden, dtype=dtype, requires_grad=True),
        (torch.randn(vocabulary, hidden, dtype=dtype) * 0.4).requires_grad_(),
        torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None,
        torch.randint(0, vocabulary, (rows,)),
        pairs,
        torch.ones(len(pairs)) if weights is None else torch.tensor(weights),
    )


def fused(p: Problem, objective=None, **options) -> FusedLoss:
    objective = objective or Objective(beta=0.3)
    return fused_orpo_loss(p.hidden, p.weight, p.targets, p.pairs, p.pair_weight, objective, bias=p.bias, **options)


def plain(p: Problem, objective=None, transform=None, tokens=None, pairs=None, extra=0.0) -> FusedLoss:
    """The same by autograd over all logits. `extra` is added to the head's output."""
    transform = transform or LogitTransform()
    logits = (torch.nn.functional.linear(p.hidden, p.weight, p.bias) + extra) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logps = torch.log_softmax(logits, 1).gather(1, p.targets[:, None])[:, 0]
    starts = pair_starts(p.pairs)
    scores = PairScores(
        chosen_logps=torch.stack([logps[s.chosen : s.rejected].mean() for s in starts]),
        rejected_logps=torch.stack([logps[s.rejected : s.end].mean() for s in starts]),
        nll_sum=-torch.stack([logps[s.prompt : s.rejected].sum() for s in starts]),
        nll_tokens=torch.tensor([s.rejected - s.prompt for s in starts]),
        chosen_logits=torch.stack([logits[s.chosen : s.rejected].mean() for s in starts]),
        rejected_logits=torch.stack([logits[s.rejected : s.end].mean() for s in starts]),
        weight=p.pair_weight.to(logits.dtype),
    )
    tokens = (scores.weight * scores.nll_tokens).sum() if tokens is None else tokens
    pairs = scores.weight.sum() if pairs is None else pairs
    return FusedLoss(orpo_loss(scores, objective or Objective(beta=0.3), tokens, pairs), scores)


def gradients(result: FusedLoss, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(result.loss, leaves))


def assert_equal(p: Problem, options: dict, objective=None, tolerance=1e-12, **chunking) -> None:
    expected, got = plain(p, objective, **options), fused(p, objective, **options, **chunking)
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=tolerance)
    for name, value in vars(expected.scores).items():
        torch.testing.assert_close(
            getattr(got.scores, name), value.detach().to(p.hidden.dtype), rtol=tolerance, atol=tolerance, msg=name
        )
    for a, b in zip(gradients(got, p.leaves), gradients(expected, p.leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "transform",
    [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(softcap=2.0), LogitTransform(1.7, 3.0)],
    ids=["plain", "scale", "softcap", "scale+softcap"],
)
def test_equals_autograd(chunk_rows, bias, transform):
    assert_equal(problem(bias=bias), {"transform": transform}, chunk_rows=chunk_rows)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_global_totals_and_label_smoothing(chunk_rows):
    totals = {"tokens": torch.tensor(12345.0, dtype=torch.float64), "pairs": torch.tensor(64.0, dtype=torch.float64)}
    assert_equal(problem(), totals, Objective(beta=1.3, label_smoothing=0.2), chunk_rows=chunk_rows)


def test_completion_scope_is_pairs_without_prompt_rows():
    completions = [PairRows(0, p.chosen, p.rejected) for p in PAIRS]
    for chunk_rows in CHUNKS:
        assert_equal(problem(completions), {}, chunk_rows=chunk_rows)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_filler_adds_exactly_nothing(chunk_rows):
    weights = [1.0, 0.0, 1.0, 0.0, 1.0]
    p = problem(weights=weights)
    with torch.no_grad():  # fillers whose log-probabilities are next to 0 and at the other end
        starts = pair_starts(p.pairs)
        for i, sign in ((1, 1.0), (3, -1.0)):
            rows = slice(starts[i].prompt, starts[i].end)
            p.hidden[rows] = sign * 400 * p.weight[p.targets[rows]]
    result = fused(p, chunk_rows=chunk_rows)
    hidden_gradient, weight_gradient = gradients(result, p.leaves)
    assert torch.isfinite(weight_gradient).all() and torch.isfinite(result.loss)
    for i in (1, 3):
        assert hidden_gradient[starts[i].prompt : starts[i].end].abs().max() == 0

    real = torch.cat([torch.arange(s.prompt, s.end) for s, w in zip(starts, weights, strict=True) if w])
    alone = problem([pair for pair, w in zip(PAIRS, weights, strict=True) if w])
    alone.hidden, alone.targets, alone.weight = p.hidden.detach()[real].requires_grad_(), p.targets[real], p.weight
    expected = fused(alone, chunk_rows=chunk_rows)
    torch.testing.assert_close(result.loss, expected.loss, rtol=0, atol=1e-13)
    torch.testing.assert_close(weight_gradient, gradients(expected, alone.leaves)[1], rtol=0, atol=1e-13)


def test_only_fillers_give_zero_gradients():
    p = problem([PairRows(1, 1, 1)], weights=[0.0])
    one = torch.tensor(1.0, dtype=torch.float64)
    result = fused(p, tokens=100 * one, pairs=8 * one)
    assert result.loss == 0
    assert all(g.abs().max() == 0 for g in gradients(result, p.leaves))


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_side_gets_no_gradient(chunk_rows, frozen):
    p = problem(bias=True)
    getattr(p, frozen).requires_grad_(False)
    assert len(p.leaves) == 2
    assert_equal(p, {}, chunk_rows=chunk_rows)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_tied_weight_sums_both_gradients(chunk_rows):
    p = problem()
    tokens = torch.randint(0, VOCABULARY, (p.hidden.shape[0],))
    results = []
    for function in (plain, lambda q: fused(q, chunk_rows=chunk_rows)):
        tied = Problem(torch.tanh(p.weight[tokens]), p.weight, None, p.targets, p.pairs, p.pair_weight)
        results.append(torch.autograd.grad(function(tied).loss, p.weight)[0])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("train_weight", [False, True])
def test_adapters(chunk_rows, train_weight):
    p = problem(bias=True)
    p.weight.requires_grad_(train_weight)
    down = torch.randn(4, HIDDEN, dtype=torch.float64, requires_grad=True)
    up = torch.randn(VOCABULARY, 4, dtype=torch.float64, requires_grad=True)
    leaves = [*p.leaves, down, up]
    transform = LogitTransform(0.7, 3.0)
    expected = plain(p, transform=transform, extra=p.hidden @ down.t() @ up.t())
    got = fused(p, transform=transform, adapters=[Adapter(p.hidden @ down.t(), up)], chunk_rows=chunk_rows)
    for a, b in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradient_is_multiplied_by_what_arrives():
    p = problem()
    once, thrice = gradients(fused(p), p.leaves), torch.autograd.grad(fused(p).loss * 3, p.leaves)
    for a, b in zip(thrice, once, strict=True):
        torch.testing.assert_close(a, 3 * b, rtol=1e-13, atol=0)


def test_second_backward_is_refused():
    p = problem()
    loss = fused(p).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_log_probabilities_near_zero_have_finite_gradients():
    for dtype in (torch.float32, torch.float64):
        p = problem(dtype=dtype)
        with torch.no_grad():
            p.hidden.copy_(300 * p.weight[p.targets])
        result = fused(p, chunk_rows=8)
        assert result.scores.chosen_logps.max() > -1e-6
        assert torch.isfinite(result.loss)
        assert all(torch.isfinite(g).all() for g in gradients(result, p.leaves))


def test_no_gradients_when_disabled():
    p = problem()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = fused(p, chunk_rows=5)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, fused(p).loss.detach(), rtol=0, atol=1e-13)
    assert counter.get_total_flops() == 2 * p.hidden.shape[0] * HIDDEN * VOCABULARY


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_log_probabilities_equal_trl_chunked(chunk_rows, softcap):
    oracle = pytest.importorskip("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    p = problem(dtype=torch.float32, bias=True)
    logps, _, _, mean_logits, _ = oracle.apply(
        p.hidden, p.weight, p.bias, p.targets, 1.0, 32, softcap, 0.5, ("mean_logits",)
    )
    scores = fused(p, transform=LogitTransform(0.5, softcap), chunk_rows=chunk_rows).scores
    for i, s in enumerate(pair_starts(p.pairs)):
        torch.testing.assert_close(scores.chosen_logps[i], logps[s.chosen : s.rejected].mean())
        torch.testing.assert_close(scores.rejected_logps[i], logps[s.rejected : s.end].mean())
        torch.testing.assert_close(scores.nll_sum[i], -logps[s.prompt : s.rejected].sum())
        torch.testing.assert_close(
            scores.chosen_logits[i], mean_logits[s.chosen : s.rejected].mean(), atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("chunk_rows", [8, 64, 1000])
@pytest.mark.parametrize("frozen", [False, True])
def test_matmuls_per_scored_row(chunk_rows, frozen):
    p = problem([PairRows(40, 20, 30), PairRows(16, 25, 10)])
    p.weight.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        gradients(fused(p, chunk_rows=chunk_rows), p.leaves)
    per_row = counter.get_total_flops() / (2 * p.hidden.shape[0] * HIDDEN * VOCABULARY)
    assert per_row == pytest.approx(2 if frozen else 3, rel=0.02)


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages that are alive and were made inside, at their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = (
                        torch.multiprocessing.reductions.StorageWeakRef(storage),
                        storage.nbytes(),
                    )
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.now = sum(size for _, size in self.live.values())
        self.peak = max(self.peak, self.now)
        return out


def peak_bytes(chosen: int, frozen: bool) -> int:
    p = problem([PairRows(10, chosen, chosen)], dtype=torch.float32, hidden=8, vocabulary=4000)
    p.weight.requires_grad_(not frozen)
    with PeakMemory() as memory:
        grads = gradients(fused(p, chunk_rows=32), p.leaves)
    del grads
    return memory.peak


@pytest.mark.parametrize("frozen", [False, True])
def test_peak_memory_does_not_grow_with_the_completions(frozen):
    short, long = peak_bytes(40, frozen), peak_bytes(2000, frozen)
    rows = 2 * (2000 - 40)
    hidden_rows = rows * 8 * 4  # what each array of the size of the hidden rows must grow by
    assert long - short <= 4 * hidden_rows + 64 * rows
    assert short < 12 * 32 * 4000 * 4


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    p = problem([PairRows(100, 300, 200)], hidden=4, vocabulary=500)
    with Largest():
        gradients(fused(p, chunk_rows=16), p.leaves)
    assert largest == 16 * 500


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [4, 64])
def test_half_precision_stays_near_float32(dtype, chunk_rows):
    """Weights and hidden states in half precision: every sum in float32, so the error is that of the operands. Tokens
    of a large global batch: a row's gradient is then about 1e-7, below what float16 resolves."""
    exact = problem(dtype=torch.float32)
    with torch.no_grad():
        exact.hidden.copy_(exact.hidden.to(dtype))
        exact.weight.copy_(exact.weight.to(dtype))
    half = problem(dtype=torch.float32)
    half.hidden, half.weight = (x.detach().to(dtype).requires_grad_() for x in (exact.hidden, exact.weight))
    totals = {"tokens": torch.tensor(1e6), "pairs": torch.tensor(1e3)}
    got, expected = fused(half, chunk_rows=chunk_rows, **totals), fused(exact, **totals)
    assert got.loss.dtype == got.scores.chosen_logps.dtype == torch.float32
    torch.testing.assert_close(got.scores.chosen_logps, expected.scores.chosen_logps, rtol=2e-2, atol=2e-2)
    # as with a loss scaler, so that the comparison sees the float32 accumulation rather than float16's range
    scaled = [torch.autograd.grad(r.loss * 65536, q.leaves) for r, q in ((got, half), (expected, exact))]
    for a, b in zip(*scaled, strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).norm() / b.norm() < 0.02


def test_autocast_rounds_operands_and_not_sums():
    p = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused(p, chunk_rows=4)
    assert got.loss.dtype == torch.float32
    expected = fused(p)
    for a, b in zip(gradients(got, p.leaves), gradients(expected, p.leaves), strict=True):
        assert a.dtype == torch.float32
        assert 1e-4 < (a - b).norm() / b.norm() < 0.02


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 64])
def test_plan_covers_every_row_once(size):
    for pairs in itertools.permutations(PAIRS, 3):
        starts, chunks = pair_starts(pairs), plan_chunks(pairs, size)
        assert [c.start for c in chunks] == [0, *(c.stop for c in chunks[:-1])]
        assert chunks[-1].stop == starts[-1].end
        assert all(0 < c.stop - c.start <= size for c in chunks)
        assert [i for c in chunks for i in c.closes] == [0, 1, 2]
        for c in chunks:
            if c.open_branch is not None:  # all rows belong to one completion, of a pair that does not fit a chunk
                (s,) = [s for s in starts if s.chosen <= c.start < s.end]
                assert s.end - s.chosen > size
                assert (s.chosen, s.rejected)[c.open_branch] <= c.start < c.stop <= (s.rejected, s.end)[c.open_branch]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gap", [12.0, 16.0, 20.0])
def test_the_gradient_of_a_trained_head_is_finite_for_memorised_completions(dtype, gap):
    """1 - p falls to 1e-6 there, and the factor of such a row grows as 1 / (1 - p)."""
    torch.manual_seed(0)
    rows, vocabulary, width = [PairRows(10, 4, 4)] * 2, 64, 32
    targets = torch.randint(vocabulary, (sum(pair.nll_prompt + pair.chosen + pair.rejected for pair in rows),))
    head = torch.linalg.qr(torch.randn(vocabulary, vocabulary, dtype=torch.float64))[0][:, :width]
    hidden = head[targets]
    hidden = hidden / (hidden * hidden).sum(1, keepdim=True) * gap
    outlier = torch.full((len(targets), 1), 200.0)  # a large activation, which the logits do not see
    hidden, head = torch.cat([hidden, outlier], 1), torch.cat([head, torch.zeros(vocabulary, 1)], 1)
    found = {}
    for kind in (torch.float64, dtype):
        leaves = [x.to(kind).detach().clone().requires_grad_() for x in (hidden, head)]
        loss = fused_orpo_loss(
            leaves[0], leaves[1], targets, rows, torch.ones(2), Objective(0.1),
            tokens=torch.tensor(224.0), pairs=torch.tensor(16.0),
        ).loss  # fmt: skip
        found[kind] = torch.autograd.grad(loss, leaves)[1].double()
    assert ((found[dtype] - found[torch.float64]).norm() / found[torch.float64].norm()) < 0.06
