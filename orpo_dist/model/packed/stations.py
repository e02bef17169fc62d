"""Compares two ways to lay out the same pairs, layer by layer, and measures what rounding explains in each layer.

Rounding adds up over layers, and in a mixture of experts it sends a token to another expert: at the end of a deep model
in bfloat16, a layer that is wrong looks like rounding, and rounding like a layer that is wrong. So three forwards are
compared at stations, the inputs of the decoder blocks and the inputs and outputs of their token mixers:

    reference   the padded rows; the states at each station are recorded
    repeated    the padded rows again; each station's states are replaced by the recorded ones, moved by at most half a
                unit in the last place: what then differs at the next station is the noise of rounding in between
    compared    the layout to check, its states replaced by the recorded ones: what differs at the next station is
                its own noise, or a fault in between

A fault counts where every pair of the same lengths shows it at the same token, since a token that rounding sends to
another expert is another one in each pair. Rows that are given twice are the mixers' inputs times GAIN the second time:
weak scores leave attention nearly even, which hides a wrong position.

Shape legend: B pairs, S = 2B padded rows, L the longest of them, T tokens of a packed row, N distinct tokens (P, C and
R of each pair), H hidden.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_dist.model.packed.mixers import find_token_mixers
from orpo_dist.model.patches import OBSERVED_STATES, Patched, add_forward_hook, add_forward_pre_hook, undo_all
from orpo_dist.model.upstream import text_model_of
from orpo_dist.packing.layout import PackedLayout, PackedLayoutError

GAIN = 8.0
# Tolerance of a station: NOISE times the noise measured there, plus UNITS of rounding. Layouts that are right were at
# most 1.4 times the noise apart, 2 units (dense, mixtures and hybrids of up to 64 layers in float32, float16 and
# bfloat16); a fault in one layer was 4 to 100 times the tolerance in bfloat16.
NOISE, UNITS = 4.0, 3.0
# In float32 the noise is far below any fault: SmolLM2-135M's right layout was 4e-6 apart where rounding explained 1e-6.
LEAST_TOLERANCE = 1e-4

_BLOCK_IN, _MIXER_IN, _MIXER_OUT, _END = "input", "mixer's input", "mixer's output", "last states"
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class TokenMap:
    """Where the distinct tokens of the pairs stand among the rows of a forward.

    shape: (rows, length) of its token ids. place: (N,) index of each among the flattened rows. seen, token: (M,) every
    place that holds one of them, pair by pair, and which one; a prompt may stand twice. sizes: how many of those
    belong to each pair.
    """

    shape: tuple[int, int]
    place: torch.Tensor
    seen: torch.Tensor
    token: torch.Tensor
    sizes: list[int]

    @classmethod
    def padded(cls, layout: PackedLayout, shape: tuple[int, int]) -> "TokenMap":
        """Of padded rows (S, L), chosen rows first. layout: of the same pairs, packed."""
        length, pairs = shape[1], len(layout.segments)
        rows = [
            (i * length + torch.arange(s.prompt + s.chosen), (pairs + i) * length + torch.arange(s.prompt + s.rejected))
            for i, s in enumerate(layout.segments)
        ]
        return cls._of(layout, shape, rows, prompt_copies=2)

    @classmethod
    def packed(cls, layout: PackedLayout) -> "TokenMap":
        index = layout.unshare_index.cpu()
        rows = [
            (index[2 * i, : s.prompt + s.chosen], index[2 * i + 1, : s.prompt + s.rejected])
            for i, s in enumerate(layout.segments)
        ]
        return cls._of(layout, (1, layout.length), rows, prompt_copies=1 if layout.shared else 2)

    @classmethod
    def _of(
        cls,
        layout: PackedLayout,
        shape: tuple[int, int],
        rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
        prompt_copies: int,
    ) -> "TokenMap":
        place, seen, token, sizes, first = [], [], [], [], 0
        for (chosen, rejected), s in zip(rows, layout.segments, strict=True):
            own = rejected[s.prompt :]
            place += [chosen, own]
            after = first + len(chosen) + len(own)
            seen += [chosen, rejected if prompt_copies == 2 else own]
            token += [torch.arange(first, first + len(chosen))]
            token += [torch.arange(first, first + s.prompt)] if prompt_copies == 2 else []
            token += [torch.arange(first + len(chosen), after)]
            sizes.append(len(seen[-1]) + len(seen[-2]))
            first = after
        return cls(shape, torch.cat(place), torch.cat(seen), torch.cat(token), sizes)

    def to(self, device: torch.device) -> "TokenMap":
        return TokenMap(self.shape, self.place.to(device), self.seen.to(device), self.token.to(device), self.sizes)


@dataclass(frozen=True)
class Comparison:
    """worst: the station whose difference is largest beside its tolerance. difference: relative to the norm of a
    token's state there; infinite where the layout gives no number."""

    worst: str
    difference: float
    tolerance: float


@dataclass
class StationPass:
    """One forward: what happens at a station. amplified: the second half of the pairs repeats the first, with GAIN."""

    where: TokenMap
    amplified: bool
    calls: Counter[str] = field(default_factory=Counter)

    def station(self, name: str) -> str:
        """Of the next call of a module, which may be part of several layers (Zamba 2)."""
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}, call {self.calls[name]}"

    def states(self, name: str, kind: str, rows: torch.Tensor) -> torch.Tensor:
        """rows (rows, length, H) as the model computed them; returns those that it goes on with."""
        raise NotImplementedError

    def _with(self, rows: torch.Tensor, states: torch.Tensor, kind: str) -> torch.Tensor:
        """`rows` with `states` (N, H) in their places. What follows a mixer goes on with the states without gain."""
        if self.amplified and kind == _MIXER_OUT:
            states = states[: len(states) // 2].repeat(2, 1)
        flat = rows.flatten(0, 1).clone()
        flat[self.where.seen] = states[self.where.token].to(rows.dtype)
        return flat.view_as(rows)

    def _gained(self, states: torch.Tensor, kind: str) -> torch.Tensor:
        """(N, H) or (M, H) states, the second half times GAIN where a mixer takes them."""
        if not (self.amplified and kind == _MIXER_IN):
            return states
        half = len(states) // 2
        return torch.cat([states[:half], states[half:] * GAIN])


@dataclass
class _Reference(StationPass):
    """found: (N, H) states by station."""

    found: dict[str, torch.Tensor] = field(default_factory=dict)

    def states(self, name: str, kind: str, rows: torch.Tensor) -> torch.Tensor:
        states = rows.flatten(0, 1)[self.where.place]
        if self.amplified and kind != _MIXER_OUT:
            states = states[: len(states) // 2].repeat(2, 1)
        states = self._gained(states, kind)
        self.found[self.station(name)] = states
        return self._with(rows, states, kind)


@dataclass
class _Against(StationPass):
    """wanted: what the reference found. moved_by: relative shift of the states. errors: (M,) by station."""

    wanted: dict[str, torch.Tensor] = field(default_factory=dict)
    moved_by: float = 0.0
    errors: dict[str, torch.Tensor] = field(default_factory=dict)
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def states(self, name: str, kind: str, rows: torch.Tensor) -> torch.Tensor:
        name = self.station(name)
        if name not in self.wanted:
            raise PackedLayoutError(f"its forward reaches {name}, which that of padded rows does not")
        states = self.wanted[name]
        wide = torch.promote_types(rows.dtype, torch.float32)  # Apple's GPUs have no float64
        ours = self._gained(rows.flatten(0, 1)[self.where.seen], kind).to(wide)
        theirs = states[self.where.token].to(wide)
        difference = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(_TINY)
        overflown = torch.inf if kind == _END else 0.0  # of rows times GAIN in float16, say
        difference = difference.where(theirs.isfinite().all(-1), overflown)
        self.errors[name] = difference.nan_to_num(nan=torch.inf, posinf=torch.inf)
        if self.moved_by:
            shift = torch.rand(states.shape, generator=self.random).to(states.device) * 2 - 1
            states = (states.to(wide) * (1 + self.moved_by * shift)).to(states.dtype)
        return self._with(rows, states, kind)


def compare_layouts(
    base: PreTrainedModel,
    reference: Callable[[], object],
    compared: Callable[[], object],
    *,
    layout: PackedLayout,
    padded: tuple[int, int],
    packed: bool,
    unit: float,
    amplified: bool,
) -> Comparison:
    """Run both forwards and find the station where they differ most, beside what rounding explains there.

    Args:
        reference: runs the padded rows; called twice.
        compared: runs the layout to check.
        layout: of the pairs, packed. padded: (S, L). packed: whether `compared` runs the packed row, else padded rows.
        unit: relative unit of rounding of the computation.
        amplified: the second half of the pairs repeats the first, see above.

    Raises:
        PackedLayoutError: the compared forward goes another way through the model.
    """
    device = next(base.parameters()).device
    padded_map = TokenMap.padded(layout, padded).to(device)
    ours_map = TokenMap.packed(layout).to(device) if packed else padded_map
    found = _Reference(padded_map, amplified)
    with observed_stations(base, found):
        reference()
    repeated = _Against(padded_map, amplified, wanted=found.found, moved_by=unit / 2)
    with observed_stations(base, repeated):
        reference()
    ours = _Against(ours_map, amplified, wanted=found.found)
    with observed_stations(base, ours):
        compared()
    missed = next((name for name in repeated.errors if name not in ours.errors), None)
    if missed is not None:
        raise PackedLayoutError(f"its forward does not reach {missed}, which that of padded rows does")
    return _worst(ours, repeated, _equal_lengths(layout, amplified), unit)


def _worst(ours: _Against, repeated: _Against, groups: Sequence[Sequence[int]], unit: float) -> Comparison:
    """Reads from the device once."""
    names, found = [], []
    for name, values in ours.errors.items():
        rounding = values.new_empty(len(ours.where.place))
        rounding[repeated.where.token] = repeated.errors[name]
        for group in groups:
            difference = _in_all(group, values, ours.where)
            noise = _in_all(group, rounding[ours.where.token], ours.where).nan_to_num(posinf=0.0)
            tolerance = NOISE * noise.maximum(noise.square().mean().sqrt()) + UNITS * unit
            tolerance = tolerance.clamp(min=LEAST_TOLERANCE)
            place = (difference / tolerance).argmax()
            names.append(name)
            found.append(torch.stack([difference[place], tolerance[place]]))
    if not found:
        raise PackedLayoutError("no layer of it was recognised")
    differences, tolerances = torch.stack(found, 1).tolist()
    worst = max(range(len(names)), key=lambda i: differences[i] / tolerances[i])
    return Comparison(names[worst], differences[worst], tolerances[worst])


def _in_all(group: Sequence[int], values: torch.Tensor, where: TokenMap) -> torch.Tensor:
    """The smallest value of each token among pairs of equal lengths."""
    parts = values.split(where.sizes)
    return torch.stack([parts[pair] for pair in group]).amin(0)


def _equal_lengths(layout: PackedLayout, amplified: bool) -> list[list[int]]:
    half = len(layout.segments) // 2
    groups: dict[tuple, list[int]] = {}
    for i, s in enumerate(layout.segments):
        groups.setdefault((s.prompt, s.chosen, s.rejected, amplified and i >= half), []).append(i)
    return list(groups.values())


# ---------------------------------------------------------------- hooks


@contextmanager
def observed_stations(base: PreTrainedModel, work: StationPass) -> Iterator[None]:
    text_model = text_model_of(base)
    mixers = find_token_mixers(text_model)
    inside = {id(mixer.module) for mixer in mixers}
    handles: list[Patched] = []
    for name, module in text_model.named_modules():
        if id(module) in inside:
            # First, before a mixer on unshared rows gets them.
            handles.append(add_forward_pre_hook(module, _taking(work, name, _MIXER_IN), OBSERVED_STATES, first=True))
            handles.append(add_forward_hook(module, _giving(work, name, _MIXER_OUT), OBSERVED_STATES))
        elif isinstance(module, GradientCheckpointingLayer) and not inside.isdisjoint(map(id, module.modules())):
            handles.append(add_forward_pre_hook(module, _taking(work, name, _BLOCK_IN), OBSERVED_STATES, first=True))
    handles.append(add_forward_hook(text_model, _giving(work, "the model", _END), OBSERVED_STATES))
    try:
        yield
    finally:
        undo_all(handles)


def _is_states(value: Any, work: StationPass) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 3
        and value.shape[:2] == work.where.shape
        and value.is_floating_point()
    )


def _taking(work: StationPass, name: str, kind: str) -> Callable[..., Any]:
    """A pre-hook on a block or mixer: its first argument of the shape of states is the states."""
    station = f"{name} ({kind})"

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        for i, value in enumerate(args):
            if _is_states(value, work):
                return (*args[:i], work.states(station, kind, value), *args[i + 1 :]), kwargs
        for key, value in kwargs.items():
            if _is_states(value, work):
                return args, {**kwargs, key: work.states(station, kind, value)}
        return None

    return hook


def _giving(work: StationPass, name: str, kind: str) -> Callable[..., Any]:
    """A hook on a mixer or on the text model: its first output is the states."""
    station = f"{name} ({kind})"

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if _is_states(output, work):
            return work.states(station, kind, output)
        if isinstance(output, tuple) and output and _is_states(output[0], work):
            return (work.states(station, kind, output[0]), *output[1:])
        if kind == _END and _is_states(output[0], work):  # transformers' ModelOutput; nothing follows that reads it
            work.states(station, kind, output[0])
        return output

    return hook
