"""Selects the CUDA kernel for the packed attention of a layer. Each kernel is tested on this device before it is used.

    plain or sliding window                   flash-attn 3, torch's varlen attention, flash-attn 2
    logit softcap (Gemma 2)                   flash-attn 3, flash-attn 2, FlexAttention
    sinks (GPT-OSS)                           FlexAttention
    bidirectional images (Gemma 3)            FlexAttention

The packed layout depends on how a kernel aligns a causal mask whose queries are fewer than its keys (bottom-right), on
how a window is counted, on grouped heads: details that differ between versions and fail silently. So the first time
that a kind of layer runs on a device, each candidate computes a small packed row there, forward and backward, and is
compared with explicit maths in float64. The first that agrees is used from then on; failures are logged.

Shape legend: T tokens of the packed row, K keys over all sequences, D head size, Hq query heads, Hk key heads.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from orpo_dist.distributed.log import get_logger
from orpo_dist.model.attention.flex import flex_packed_attention
from orpo_dist.model.attention.sequences import Scores, explicit_attention
from orpo_dist.model.upstream import is_out_of_memory
from orpo_dist.packing.layout import PackedLayout, PairSegment

logger = get_logger(__name__)

PackedKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedLayout, Scores], torch.Tensor]
"""query (1, Hq, T, D), key and value (1, Hk, T, D) to (1, T, Hq, D)"""

VarlenFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedLayout, Scores], torch.Tensor]
"""query (T, Hq, D), key and value (K, Hk, D) to (T, Hq, D)"""

_FLASH_HEAD_SIZE = 256  # largest head of the flash kernels, which also want multiples of 8
TRIAL_LENGTHS = ((150, 70, 131), (37, 1, 9), (1, 5, 2))  # P, C, R: beyond one tile of 128, and down to single tokens
TRIAL_WINDOW = 33
# |ours - exact| / |exact|, norms over the whole tensor. Half precision is off by 1e-3 to 1e-2, a wrong mask by tenths.
TRIAL_TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class KernelCase:
    """What decides whether a kernel can compute a layer: facts of its tensors, and which scores it has."""

    device: torch.device
    dtype: torch.dtype
    query_heads: int
    key_heads: int
    head_size: int
    value_size: int
    windowed: bool
    softcap: bool
    sinks: bool
    dropout: bool
    prompt_blocks: bool

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
    ) -> "KernelCase":
        return cls(
            device=query.device,
            dtype=query.dtype,
            query_heads=query.shape[1],
            key_heads=key.shape[1],
            head_size=query.shape[3],
            value_size=value.shape[3],
            windowed=scores.window is not None,
            softcap=scores.softcap is not None,
            sinks=scores.sinks is not None,
            dropout=scores.dropout > 0,
            prompt_blocks=layout.prompt_blocks is not None,
        )

    def __str__(self) -> str:
        extras = [name for name in ("windowed", "softcap", "sinks", "dropout", "prompt_blocks") if getattr(self, name)]
        heads = f"{self.query_heads}/{self.key_heads} heads of {self.head_size}"
        return ", ".join([f"{str(self.dtype).removeprefix('torch.')} on {self.device}", heads, *extras])


@dataclass(frozen=True)
class Candidate:
    name: str
    kernel: PackedKernel


@cache
def trusted_kernel(case: KernelCase) -> Candidate | None:
    """The first candidate that computes `case` correctly on its device, None where attention must go sequence by
    sequence. The first call of each case runs the trials, which wait for the device."""
    if case.device.type != "cuda":
        return None
    obstacle = _obstacle(case)
    if obstacle:
        logger.warning("Packed attention goes sequence by sequence (%s): %s.", case, obstacle)
        return None
    return first_that_passes(candidates(case), case)


def first_that_passes(proposed: Iterable[Candidate], case: KernelCase) -> Candidate | None:
    """Logs each candidate that fails, and the one that is used."""
    for candidate in proposed:
        try:
            error = trial_error(candidate.kernel, case)
        except Exception as failure:  # any error of a kernel, its compiler or its driver: the next candidate may work
            if is_out_of_memory(failure):
                raise  # the trial is tiny: it says nothing about the kernel
            said = str(failure).strip().partition("\n")[0]
            logger.warning(
                "%s is not used for attention (%s): %s: %s", candidate.name, case, type(failure).__name__, said
            )
            continue
        if error <= TRIAL_TOLERANCES[case.dtype]:
            logger.info("Packed attention by %s (%s), relative error %.1g.", candidate.name, case, error)
            return candidate
        logger.warning("%s is not used for attention (%s): off by %.2g in its trial.", candidate.name, case, error)
    logger.warning(
        "Packed attention goes sequence by sequence (%s): no kernel passed its trial. It will be slow.", case
    )
    return None


def _obstacle(case: KernelCase) -> str | None:
    if case.dtype not in TRIAL_TOLERANCES:
        return "the kernels need bfloat16 or float16"
    if case.dropout:
        return "the kernels have no dropout of attention weights"
    if torch.cuda.get_device_capability(case.device) < (8, 0):
        return "the kernels need compute capability 8.0"
    return None


def candidates(case: KernelCase) -> Iterator[Candidate]:
    """The installed candidates, in order of preference."""
    flash_fits = case.head_size == case.value_size and case.head_size % 8 == 0 and case.head_size <= _FLASH_HEAD_SIZE
    if flash_fits and not case.sinks and not case.prompt_blocks:
        if find_spec("flash_attn_interface") is not None:
            yield Candidate("flash-attn 3", on_gathered_keys(_flash_attn_3))
        if not case.softcap:
            yield Candidate("torch varlen", on_gathered_keys(_torch_varlen))
            if case.query_heads != case.key_heads:
                yield Candidate("torch varlen on expanded keys", on_gathered_keys(_torch_varlen_expanded))
        if find_spec("flash_attn") is not None:
            yield Candidate("flash-attn 2", on_gathered_keys(_flash_attn_2))
    if find_spec("triton") is not None:
        yield Candidate("FlexAttention", flex_packed_attention)


# ---------------------------------------------------------------- the trial


def trial_error(kernel: PackedKernel, case: KernelCase) -> float:
    """Largest relative error of output and gradients over a packed row with shared and one with doubled prompts."""
    return max(_trial(kernel, case, sharing) for sharing in (True, False))


def _trial(kernel: PackedKernel, case: KernelCase, sharing: bool) -> float:
    layout = _trial_layout(sharing)
    if case.prompt_blocks:
        layout.prompt_blocks = torch.cat([torch.arange(s.prompt) // 60 - s.prompt % 2 for s in layout.segments])
    layout.to(case.device)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = scale * torch.randn(shape, generator=generator)
        return values.to(case.device, case.dtype).requires_grad_()

    query = leaf(1, case.query_heads, layout.length, case.head_size)
    key = leaf(1, case.key_heads, layout.length, case.head_size)
    value = leaf(1, case.key_heads, layout.length, case.value_size)
    scores = Scores(
        scale=2 * case.head_size**-0.5,  # uneven weights, which a wrong mask cannot leave as they are
        window=TRIAL_WINDOW if case.windowed else None,
        softcap=3.0 if case.softcap else None,
        sinks=leaf(case.query_heads) if case.sinks else None,
    )
    inputs = [query, key, value] if scores.sinks is None else [query, key, value, scores.sinks]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact_scores = replace(scores, sinks=exact_inputs[3] if case.sinks else None)
    upstream = torch.randn(1, layout.length, case.query_heads, case.value_size, generator=generator)
    upstream = upstream.to(case.device, case.dtype)
    with torch.enable_grad(), torch.autocast(case.device.type, enabled=False):
        output = kernel(query, key, value, layout, scores)
        exact = explicit_attention(exact_inputs[0], exact_inputs[1], exact_inputs[2], layout, exact_scores)
        found = [output, *torch.autograd.grad(output, inputs, upstream)]
        expected = [exact, *torch.autograd.grad(exact, exact_inputs, upstream.double())]
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    error = torch.stack(errors).max().item()
    return error if error == error else float("inf")  # nan compares with nothing


def _trial_layout(sharing: bool) -> PackedLayout:
    segments: list[PairSegment] = []
    start = 0
    for prompt, chosen, rejected in TRIAL_LENGTHS:
        segments.append(PairSegment(start, prompt, chosen, rejected, 1 if sharing else 2, prompt - 1))
        start += segments[-1].tokens
    return PackedLayout(segments, torch.zeros(start, dtype=torch.long), torch.ones(len(segments)), [])


# ---------------------------------------------------------------- one varlen call


class _GatherKeys(torch.autograd.Function):
    """Rows of keys or values (T, Hk, D) to those of all sequences (K, Hk, D), where a shared prompt stands twice.

    index_select's own backward adds with atomics, in no fixed order. Here every row has one source, a prompt's row two.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        assert layout.key_index is not None
        ctx.layout = layout
        return rows.index_select(0, layout.key_index)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout = ctx.layout
        total = grad.index_select(0, layout.key_place)
        both = total.index_select(0, layout.prompt_rows) + grad.index_select(0, layout.prompt_again)
        return total.index_copy_(0, layout.prompt_rows, both), None


def on_gathered_keys(function: VarlenFunction) -> PackedKernel:
    """The row's queries are those of all sequences in order; keys and values are gathered to [P C][P R]."""

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
    ) -> torch.Tensor:
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
        if layout.shared:
            key, value = _GatherKeys.apply(key, layout), _GatherKeys.apply(value, layout)
        return function(query, key, value, layout, scores)[None]

    return kernel


def _window(scores: Scores) -> tuple[int, int]:
    """Tokens seen to the left and to the right of the query's own; -1 for all, and (-1, 0) is causal."""
    return (-1 if scores.window is None else scores.window - 1, 0)


@cache
def _varlen_options() -> frozenset[str]:
    return frozenset(inspect.signature(varlen_attn).parameters)


def _torch_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
) -> torch.Tensor:
    """torch 2.11 has no `enable_gqa` and no check of the heads either: its trial says whether it groups them."""
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1] and "enable_gqa" in _varlen_options():
        options["enable_gqa"] = True
    output = varlen_attn(
        query,
        key,
        value,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        scale=scores.scale,
        window_size=_window(scores),
        **options,
    )
    assert isinstance(output, torch.Tensor)  # a tuple only where the log-sum-exp is asked for
    return output


def _torch_varlen_expanded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    return _torch_varlen(query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), layout, scores)


def _flash_attn_2(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func, query, key, value, layout, scores)


def _flash_attn_3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
) -> torch.Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    output = _flash_attn(flash_attn_varlen_func, query, key, value, layout, scores)
    return output[0] if isinstance(output, tuple) else output  # early builds return the log-sum-exp as well


def _flash_attn(
    function: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    scores: Scores,
) -> Any:
    return function(
        query,
        key,
        value,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        softmax_scale=scores.scale,
        causal=True,
        window_size=_window(scores),
        softcap=scores.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
