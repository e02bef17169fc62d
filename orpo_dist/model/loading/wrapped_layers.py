"""Layer classes that FSDP or DeepSpeed is told to wrap, by name, against those that the model has."""

import os
from typing import Any

import torch
from torch import nn

from orpo_dist.distributed.environment import Sharding, loading_sharding
from orpo_dist.errors import UserError
from orpo_dist.model.loading.load import auto_class_of, load_config, loading_whole_models

# How `accelerate launch` tells its processes (accelerate/utils/launch.py), by the option of its config file.
_FSDP, _ZERO3 = "FSDP_TRANSFORMER_CLS_TO_WRAP", "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"
_OPTIONS = {_FSDP: "fsdp_transformer_layer_cls_to_wrap", _ZERO3: "deepspeed_moe_layer_cls_names"}


def refuse_unknown_layers(
    model: nn.Module | str | None, *, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """model: the model, its name or folder, of which the config is read alone, or None.

    Raises:
        UserError: a layer class to wrap that the model does not have.
    """
    sharding = loading_sharding()
    variable = {Sharding.FSDP: _FSDP, Sharding.ZERO3: _ZERO3}.get(sharding)
    asked = [name for name in os.environ.get(variable, "").split(",") if name] if variable else []
    if not asked or model is None or variable is None:
        return
    if isinstance(model, str):
        model = _without_weights(load_config(model, revision=revision, trust_remote_code=trust_remote_code))
    present = {type(module).__name__ for module in model.modules()}
    missing = [name for name in asked if name not in present]
    if missing:
        layers = sorted(name for name in present if name.endswith(("Layer", "Block", "Experts")))
        raise UserError(
            f"{_OPTIONS[variable]} names {', '.join(missing)}, and the model has no such layer. It has "
            f"{', '.join(layers)}. Leave the option out to wrap what the model names itself."
        )


def _without_weights(config: Any) -> nn.Module:
    with loading_whole_models(), torch.device("meta"):
        return auto_class_of(config).from_config(config)
