"""The loss head inside a causal language model: `model(..., orpo_layout=layout)` returns the loss.

    the model's own forward, with a stand-in for its output layer -> hidden states of the packed or padded rows
    the output layer, called on the scored rows with fused_loss as its forward (head/call.py) -> loss, scores

The model's own forward is used unchanged, so everything it does around its body (images, routers, scaling of the hidden
states) is kept. What it does to the logits afterwards is measured once, on the output of the stand-in, because configs
have many names for it.

Nothing is added to the model: names in its state dict do not change, and adapters may be added before or after.

Shape legend: N scored rows, H hidden, V vocabulary.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.distributed.devices import widest_float
from orpo_dist.loss import Objective, PairScores
from orpo_dist.model.head.call import HeadOptions, PairLayout, call_head
from orpo_dist.model.head.chunked_pass import LogitTransform
from orpo_dist.model.patches import HEAD_STAND_IN, LOSS_HEAD, Patched, replace_attribute, replace_item
from orpo_dist.model.routers import balancing_loss
from orpo_dist.packing.layout import PackedLayout, PackedLayoutError
from orpo_dist.packing.padded import PaddedLayout

# Where the logit transform is measured: so near 0 that a softcap is linear there, and so far that it is flat.
NEAR, FAR = 2.0**-20, 3.0e4


def install_head(
    model: PreTrainedModel | PeftModel,
    objective: Objective,
    *,
    chunk_rows: int | None = None,
    router_aux_loss_coef: float = 0.0,
) -> Patched:
    """Add the keyword `orpo_layout` to a causal language model's forward; without it nothing changes.

    With a PackedLayout, or a PaddedLayout with `rows`, that carries `tokens` and `pairs`, the forward returns the ()
    loss of this micro-batch, its share of the global one, and writes `layout.scores` (float32, no gradient). Under
    `torch.no_grad()` it does the same without forming gradients; without `tokens` and `pairs` it normalises by the
    rows' own, routers left out. A packed layout is passed on to the model's layers, a padded one is not.

    A second call replaces the first. Returns the handle that removes the head.

    Args:
        model: a model, or one in a PeftModel.
        chunk_rows: rows whose logits exist at once; unset, see fused_loss.default_chunk_rows.
        router_aux_loss_coef: weight of a mixture-of-experts model's load-balancing loss, which is taken per
            micro-batch and weighted by the micro-batch's share of the NLL tokens.

    Raises:
        PackedLayoutError: the model has no output layer, or, at the first forward, one of a kind that the fused loss
            cannot replace.
    """
    return loss_head(model, objective, chunk_rows=chunk_rows, router_aux_loss_coef=router_aux_loss_coef).put_on()


def loss_head(
    model: PreTrainedModel | PeftModel,
    objective: Objective,
    *,
    chunk_rows: int | None = None,
    router_aux_loss_coef: float = 0.0,
) -> "LossHead":
    """The head that `install_head` installs, not yet on the model. The arguments are the same."""
    base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    return LossHead(base, _find_head(base), objective, chunk_rows, router_aux_loss_coef)


def _forward_without_head(base: PreTrainedModel) -> Callable[..., Any]:
    """The forward to build on. An earlier head of this model is taken off, or passed by where it has been wrapped."""
    earlier = getattr(base.forward, "loss_head", None)  # our own mark, which functools.wraps copies to a wrapper
    if earlier is None or earlier.base is not base or earlier.handle.undo():
        return base.forward
    return earlier.model_forward


@dataclass
class LossHead:
    """A head for one model, to be put on and taken off.

    transform: what the model does to its logits, measured in the first forward.
    model_forward, handle: the forward that it builds on, and the head in force on it, since it was last put on.
    """

    base: PreTrainedModel
    place: "_HeadPlace"
    objective: Objective
    chunk_rows: int | None
    router_aux_loss_coef: float
    transform: LogitTransform | None = None
    model_forward: Callable[..., Any] = field(init=False)
    handle: Patched = field(init=False)

    def put_on(self) -> Patched:
        """Add the keyword to the model's forward. Returns the handle that removes it."""
        base, head = self.base, self
        self.model_forward = _forward_without_head(base)

        @functools.wraps(type(base).forward)  # the Trainer, PEFT and generate read the signature
        def forward(self: PreTrainedModel, *args: Any, orpo_layout: PairLayout | None = None, **kwargs: Any) -> Any:
            if orpo_layout is None:
                return head.model_forward(*args, **kwargs)
            return head.loss(orpo_layout, args, kwargs)

        vars(forward)["loss_head"] = self
        self.handle = replace_attribute(base, "forward", types.MethodType(forward, base), LOSS_HEAD)
        return self.handle

    def loss(self, layout: PairLayout, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        tokens = layout.tokens
        balances_routers = bool(self.router_aux_loss_coef) and tokens is not None
        if balances_routers:
            kwargs = {**kwargs, "output_router_logits": True}
        hidden, outputs = self.hidden(layout, args, kwargs)
        loss = self.score(hidden, layout)
        if balances_routers and tokens is not None:
            scores = cast(PairScores, layout.scores)
            share = (layout.weight * scores.nll_tokens).sum() / tokens
            if isinstance(layout, PackedLayout) and layout.split is not None:  # each of its ranks adds this much
                share = share / layout.split.where.size
            loss = loss + self.router_aux_loss_coef * share * balancing_loss(outputs)
        return loss

    def hidden(self, layout: PairLayout, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """(N, H) hidden states of the scored rows, and the outputs of the model's own forward."""
        given = {"orpo_layout": layout} if isinstance(layout, PackedLayout) else {}
        size = self.base.config.get_text_config(decoder=True).vocab_size
        with _stand_in(self.place, probe_size=size) as stand_in:
            outputs = self.model_forward(*args, **given, **{**kwargs, "use_cache": False})
        if not stand_in.probe.numel():
            raise PackedLayoutError(f"the forward of {type(self.base).__name__} does not call its output layer.")
        if self.transform is None:
            self.transform = measure_transform(stand_in.probe, outputs.logits)
        return scored_hidden(stand_in.hidden, layout), outputs

    def score(self, hidden: torch.Tensor, layout: PairLayout) -> torch.Tensor:
        """() loss of (N, H) scored rows. Writes `layout.scores`."""
        assert self.transform is not None
        return call_head(self.place.head, hidden, layout, HeadOptions(self.objective, self.transform, self.chunk_rows))


def scored_hidden(hidden: torch.Tensor, layout: PairLayout) -> torch.Tensor:
    """(N, H) scored rows of what the output layer is given, (1, T, H), (1, w, H) of a slice, or (2B, L, H).

    Raises:
        PackedLayoutError: it is given other rows than the padded batch has.
    """
    if isinstance(layout, PaddedLayout) and hidden.shape[:-1] != layout.targets.shape:
        given = " x ".join(map(str, hidden.shape[:-1]))
        raise PackedLayoutError(
            f"the output layer is given {given} rows of a batch of {' x '.join(map(str, layout.targets.shape))}."
        )
    split = layout.split if isinstance(layout, PackedLayout) else None
    rows = layout.rows if split is None else split.rows
    assert rows is not None
    return hidden.flatten(0, -2).index_select(0, rows)


# ---------------------------------------------------------------- the model's forward without its output layer


@dataclass(frozen=True)
class _HeadPlace:
    """Where the output layer hangs. Looked up at each call, since PEFT may put a wrapper there."""

    parent: nn.Module
    name: str

    @property
    def head(self) -> nn.Module:
        return self.parent.get_submodule(self.name)


def _find_head(model: PreTrainedModel) -> _HeadPlace:
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if head is not None and module is head:
            parent, _, name = path.rpartition(".")
            return _HeadPlace(model.get_submodule(parent), name)
    raise PackedLayoutError(f"{type(model).__name__} has no output layer that its forward calls.")


class _StandIn(nn.Module):
    """Takes the output layer's place in the model's forward: keeps the hidden states, returns the probe for logits."""

    def __init__(self, head: nn.Module, probe_size: int):
        super().__init__()
        self._head_weight = lambda: cast(torch.Tensor, head.weight)
        self._probe_size = probe_size
        self.hidden = self.probe = torch.empty(0)

    @property
    def weight(self) -> torch.Tensor:
        """Some models cast their hidden states to the dtype of `lm_head.weight`."""
        return self._head_weight()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.hidden = hidden
        wide = widest_float(hidden.device)
        self.probe = torch.linspace(-40, 40, self._probe_size, dtype=wide, device=hidden.device)
        self.probe[0], self.probe[1] = NEAR, FAR
        return self.probe.expand(1, 1, -1)


@contextmanager
def _stand_in(place: _HeadPlace, probe_size: int) -> Iterator[_StandIn]:
    stand_in = _StandIn(place.head, probe_size)
    with replace_item(place.parent._modules, place.name, stand_in, HEAD_STAND_IN):
        yield stand_in


def measure_transform(probe: torch.Tensor, seen: torch.Tensor) -> LogitTransform:
    """What a model does to its logits, from `probe` (V,) and what became of it, `seen` (1, 1, V).

    Reads from the device: once per model.

    Raises:
        PackedLayoutError: it is not a factor and a softcap, or some logits are cut off or masked.
    """
    sent, got = probe.tolist(), seen.detach().cpu().double().flatten().tolist()
    scale = got[0] / sent[0]
    softcap = None if abs(got[1] - scale * sent[1]) <= 1e-3 * abs(scale * sent[1]) else got[1]
    expected = scale * probe
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    if len(got) != len(sent) or not torch.allclose(
        torch.tensor(got).double(), expected.cpu().double(), rtol=1e-4, atol=1e-6
    ):
        raise PackedLayoutError("the model changes its logits by more than a factor and a softcap.")
    return LogitTransform(scale, softcap)
