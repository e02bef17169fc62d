"""Rotary embeddings whose frequencies depend on the longest position of a forward ("dynamic" and "longrope").

Left alone they give the same pair different positions in different micro-batches, and reading the longest position
makes the host wait for the device. Training fixes them for max_length.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from orpo_dist.model.patches import FIXED_ROTARY, Patched, replace_attribute

_FIXED = "default"  # what the forward reads as "keep the frequencies"


def fix_rotary_frequencies(model: nn.Module, max_length: int | None) -> dict[str, list[Patched]]:
    """Set the frequencies that a sequence of max_length tokens has. Returns the handles by the names of the modules.

    max_length None: the model's own max_position_embeddings. A second call changes nothing.
    Source: `dynamic_rope_update` in transformers' modeling_rope_utils.py.
    """
    changed: dict[str, list[Patched]] = {}
    for name, module in model.named_modules():
        rope_type = vars(module).get("rope_type")
        if isinstance(rope_type, str) and _moves(rope_type):
            handles = _fix(module, rope_type, max_length, layer_type=None)
            changed[name] = [*handles, replace_attribute(module, "rope_type", _FIXED, FIXED_ROTARY)]
        elif isinstance(rope_type, dict) and any(_moves(kind) for kind in rope_type.values()):
            moving = {layer_type: kind for layer_type, kind in rope_type.items() if _moves(kind)}
            handles = [
                handle for layer_type, kind in moving.items() for handle in _fix(module, kind, max_length, layer_type)
            ]
            fixed = rope_type | dict.fromkeys(moving, _FIXED)
            changed[name] = [*handles, replace_attribute(module, "rope_type", fixed, FIXED_ROTARY)]
    return changed


def _moves(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def _fix(module: nn.Module, rope_type: str, max_length: int | None, layer_type: str | None) -> list[Patched]:
    prefix = "" if layer_type is None else f"{layer_type}_"
    options = {} if layer_type is None else {"layer_type": layer_type}
    buffer = module.get_buffer(f"{prefix}inv_freq")
    config: PreTrainedConfig = vars(module)["config"]
    length = max_length or config.max_position_embeddings
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, buffer.device, seq_len=length, **options)
    before = buffer.clone()
    with torch.no_grad():
        buffer.copy_(frequencies)
    return [
        Patched(FIXED_ROTARY, lambda: module.get_buffer(f"{prefix}inv_freq").copy_(before)),
        replace_attribute(module, f"{prefix}attention_scaling", scaling, FIXED_ROTARY),
    ]
