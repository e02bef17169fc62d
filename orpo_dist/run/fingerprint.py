"""The fingerprint of a run, saved in every checkpoint and compared when resuming."""

import hashlib
from enum import Enum
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.config import ORPOConfig
from orpo_dist.model.loading.load import base_identity
from orpo_dist.packing.lengths import TOKEN_COLUMNS, PairLengths
from orpo_dist.run.local_model import content_digest
from orpo_dist.run.machine import versions

SAMPLED_ROWS = 1000
# Options that determine the weights. Everything else may change: more epochs or steps, saving, logging, evaluating,
# reporting, the layout, the split of the global batch into ranks and micro-batches (docs/numerics.md).
OPTIONS = (
    "beta",
    "label_smoothing",
    "nll_scope",
    "router_aux_loss_coef",
    "disable_dropout",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "bf16",
    "fp16",
)


def fingerprint(
    args: ORPOConfig, model: nn.Module, rows: Any, lengths: list[PairLengths], global_batch: int
) -> dict[str, Any]:
    """The parts that must not change, as short values under readable names, and the versions of the libraries."""
    options = {"global batch": global_batch, **{name: _plain(getattr(args, name)) for name in OPTIONS}}
    if args.train_sampling_strategy == "sequential":  # absent otherwise, as in checkpoints from before it was honoured
        options["train_sampling_strategy"] = "sequential"
    return {
        "model": _model(model),
        "data": {"pairs": len(lengths), "content": _content(rows, lengths)},
        "options": options,
        "versions": versions(),
    }


def differences(saved: dict[str, Any], now: dict[str, Any], part: str) -> list[str]:
    """`name: saved value -> current value` for every entry of one part that differs."""
    before, after = dict(saved.get(part, {})), dict(now[part])
    if part == "model":
        _compare_local_models_by_content(before, after)
    names = [*before, *(name for name in after if name not in before)]
    return [
        f"{name}: {before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _compare_local_models_by_content(before: dict[str, Any], after: dict[str, Any]) -> None:
    """A model's folder may be moved. Checkpoints from before contents were noted are compared by its path."""
    by_content = "content" in before and "content" in after
    for parts in (before, after):
        parts.pop("name" if by_content else "content", None)


def _model(model: nn.Module) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    base: Any = model
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        adapter = model.peft_config[model.active_adapter].to_dict()
        adapter.pop("peft_version", None)  # among the versions
        parts["adapter"] = _digest(repr(_plain(adapter)))
    parts["class"] = type(base).__name__
    if isinstance(base, PreTrainedModel):
        identity = base_identity(base)
        parts |= {"name": identity.name, "revision": identity.revision}
        if Path(identity.name).is_dir():
            parts["content"] = content_digest(Path(identity.name))
    # ds_shape: ZeRO-3 leaves an empty tensor in the place of a parameter.
    shapes = [(name, tuple(getattr(p, "ds_shape", p.shape)), p.requires_grad) for name, p in model.named_parameters()]
    parts["parameters"] = _digest(repr(sorted(shapes)))
    return parts


def _content(rows: Any, lengths: list[PairLengths]) -> str:
    """A digest of the lengths of all pairs and of the token ids of a thousand evenly spaced ones."""
    state = hashlib.sha256(repr([(pair.prompt, pair.chosen, pair.rejected) for pair in lengths]).encode())
    if not lengths:  # a trainer that only evaluates
        return "none"
    ids = rows if isinstance(rows, list) else rows.select_columns(list(TOKEN_COLUMNS))  # no image is decoded
    for index in range(0, len(lengths), -(-len(lengths) // SAMPLED_ROWS)):
        row = ids[index]
        state.update(repr([list(row[column]) for column in TOKEN_COLUMNS]).encode())
    return state.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """The value in JSON types, so that it compares equal after a round trip."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in sorted(value.items())}
    if isinstance(value, set):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
