"""The loss head inside a causal language model: `model(..., orpo_layout=layout)` returns the loss.

    the model's own forward, with a stand-in for its output layer -> hidden states of the packed row
    the output layer, called as a module on the scored rows, with fused_loss in place of its forward -> loss, scores

The model's own forward is used as it is, so whatever it does around its body (images, routers, scaling of the hidden
states) stays. What it does to the logits afterwards is measured once, on the stand-in's output, instead of being read
from one of the many names that configs have for it.

The output layer must be called as a module: the hooks of ZeRO-3 and FSDP2 gather its weight for the call, and only for
it. Nothing is added to the model: names in its state dict stay, and adapters may be added before or after.

Shape legend: N scored rows, T tokens of a row, H hidden, V vocabulary, r rank of an adapter.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.loss import Objective, PairScores
from orpo_dist.model.head.chunks import PairRows
from orpo_dist.model.head.fused_loss import Adapter, LogitTransform, fused_orpo_loss
from orpo_dist.packing.layout import PackedLayout, PackedLayoutError

# Where the logit transform is measured: so near 0 that a softcap is linear there, and so far that it is flat.
NEAR, FAR = 2.0**-20, 3.0e4


def install_head(
    model: PreTrainedModel | PeftModel,
    objective: Objective,
    *,
    chunk_rows: int | None = None,
    router_aux_loss_coef: float = 0.0,
) -> None:
    """Teach a causal language model the keyword `orpo_layout`; without it nothing changes.

    With a PackedLayout that carries `tokens` and `pairs`, the forward returns the () loss of this micro-batch, its
    share of the global one, and writes `layout.scores` (float32, no gradient). Under `torch.no_grad()` it does the
    same without forming gradients; without `tokens` and `pairs` it normalises by the row's own, routers left out.

    A second call replaces the options of the first.

    Args:
        model: a model, or one in a PeftModel.
        chunk_rows: rows whose logits exist at once; unset, see fused_loss.default_chunk_rows.
        router_aux_loss_coef: weight of a mixture-of-experts model's load-balancing loss, which is taken per
            micro-batch and weighted by the micro-batch's share of the NLL tokens.

    Raises:
        PackedLayoutError: the model has no output layer, or, at the first forward, one of a kind that the fused loss
            cannot stand in for.
    """
    base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    place = _find_head(base)
    model_forward = getattr(base.forward, "forward_without_head", base.forward)
    transform: LogitTransform | None = None

    @functools.wraps(type(base).forward)  # the Trainer, PEFT and generate read the signature
    def forward(self: PreTrainedModel, *args: Any, orpo_layout: PackedLayout | None = None, **kwargs: Any) -> Any:
        nonlocal transform
        if orpo_layout is None:
            return model_forward(*args, **kwargs)
        tokens = orpo_layout.tokens
        if router_aux_loss_coef and tokens is not None:
            kwargs["output_router_logits"] = True
        with _stand_in(place, probe_size=self.config.get_text_config().vocab_size) as stand_in:
            outputs = model_forward(*args, orpo_layout=orpo_layout, **{**kwargs, "use_cache": False})
        if transform is None:
            transform = measure_transform(stand_in.probe, outputs.logits)
        options = _Options(objective, transform, chunk_rows)
        hidden = stand_in.hidden.flatten(0, -2).index_select(0, orpo_layout.rows)
        loss = _call_head(place.head, hidden, orpo_layout, options)
        if router_aux_loss_coef and tokens is not None:
            scores = cast(PairScores, orpo_layout.scores)
            share = (scores.weight * scores.nll_tokens).sum() / tokens
            loss = loss + router_aux_loss_coef * share * outputs.aux_loss
        return loss

    forward.__dict__["forward_without_head"] = model_forward
    base.forward = types.MethodType(forward, base)  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Options:
    objective: Objective
    transform: LogitTransform
    chunk_rows: int | None


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
        self.probe = torch.linspace(-40, 40, self._probe_size, dtype=torch.float64, device=hidden.device)
        self.probe[0], self.probe[1] = NEAR, FAR
        return self.probe.expand(1, 1, -1)


@contextmanager
def _stand_in(place: _HeadPlace, probe_size: int) -> Iterator[_StandIn]:
    head = place.head
    stand_in = _StandIn(head, probe_size)
    place.parent._modules[place.name] = stand_in
    try:
        yield stand_in
    finally:
        place.parent._modules[place.name] = head


def measure_transform(probe: torch.Tensor, seen: torch.Tensor) -> LogitTransform:
    """What a model does to its logits, from `probe` (V,) and what became of it, `seen` (1, 1, V).

    Reads from the device: once per model.

    Raises:
        PackedLayoutError: it is not a factor and a softcap, or some logits are cut off or masked.
    """
    sent, got = probe.tolist(), seen.detach().double().flatten().tolist()
    scale = got[0] / sent[0]
    softcap = None if abs(got[1] - scale * sent[1]) <= 1e-3 * abs(scale * sent[1]) else got[1]
    expected = scale * probe
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    if len(got) != len(sent) or not torch.allclose(torch.tensor(got).double(), expected.cpu(), rtol=1e-4, atol=1e-6):
        raise PackedLayoutError("the model changes its logits by more than a factor and a softcap.")
    return LogitTransform(scale, softcap)


# ---------------------------------------------------------------- the output layer, adapters included


def _call_head(head: nn.Module, hidden: torch.Tensor, layout: PackedLayout, options: _Options) -> torch.Tensor:
    """() loss of the scored rows (N, H), with the weights of `head` and of the adapter in it."""
    if isinstance(head, ModulesToSaveWrapper):
        copies = head.modules_to_save
        head = head.original_module if head.disable_adapters else copies[head.active_adapters[0]]
    if not isinstance(head, LoraLinear):
        return _call_linear(head, hidden, [], layout, options)
    names = [] if head.disable_adapters or head.merged else [n for n in head.active_adapters if n in head.lora_A]
    if any(name in head.lora_variant or head.lora_bias[name] for name in names):
        raise PackedLayoutError("the output layer's adapter is not plain LoRA (DoRA, lora_bias).")

    def with_adapters(remaining: list[str], adapters: list[Adapter]) -> torch.Tensor:
        # lora_B is entered like the layer itself: inside its call its weight is gathered, and stays so for the next.
        if not remaining:
            return _call_linear(head.get_base_layer(), hidden, adapters, layout, options)
        name = remaining[0]
        down, up = cast(nn.Linear, head.lora_A[name]), cast(nn.Linear, head.lora_B[name])
        x = head.lora_dropout[name](hidden.to(down.weight.dtype))
        return _call_with(
            up,
            lambda low_rank: with_adapters(remaining[1:], [*adapters, Adapter(low_rank, up.weight)]),
            down(x) * head.scaling[name],
        )

    return with_adapters(names, [])


def _call_linear(
    head: nn.Module, hidden: torch.Tensor, adapters: list[Adapter], layout: PackedLayout, options: _Options
) -> torch.Tensor:
    if not isinstance(head, nn.Linear):
        raise PackedLayoutError(f"the output layer is a {type(head).__name__}, not a linear layer or LoRA on one.")

    def fused(rows: torch.Tensor) -> torch.Tensor:
        if not head.weight.is_floating_point():
            raise PackedLayoutError(f"the output layer's weight is quantised ({head.weight.dtype}).")
        result = fused_orpo_loss(
            rows,
            head.weight,
            layout.targets,
            [PairRows(s.nll_prompt, s.chosen, s.rejected) for s in layout.segments],
            layout.weight,
            options.objective,
            bias=head.bias,
            adapters=adapters,
            transform=options.transform,
            tokens=layout.tokens,
            pairs=layout.pairs,
            chunk_rows=options.chunk_rows,
        )
        layout.scores = result.scores
        return result.loss

    return _call_with(head, fused, hidden)


def _call_with(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Calls `module` with `function` in place of its forward, so that its hooks run."""
    own = module.__dict__.get("forward")  # an instance may have been patched by somebody else
    module.forward = function
    try:
        return module(x)
    finally:
        del module.forward
        if own is not None:
            module.forward = own
