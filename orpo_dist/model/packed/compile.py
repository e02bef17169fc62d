"""torch.compile for the blocks of the text model, one by one, instead of the whole model.

A compiler gains nothing from what lies around the blocks: the loss head works chunk by chunk on host numbers, and the
packed attention takes a layout that is new in every micro-batch. So each block is compiled on its own and
breaks once, at its attention; norms, rotary embeddings and the MLP's activation are fused on either side of it.

- Blocks of one class share their compiled code, so 36 of them compile like one.
- Rows have another length in every micro-batch. Their shapes are dynamic from the start: no compilation per length.
- Activation checkpointing, PEFT, DDP and FSDP2 come around the compiled code. Names of parameters stay.
- Blocks with linear attention or another mixer that runs on unshared rows stay as they are.
"""

import types
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_dist.errors import UserError
from orpo_dist.model.packed.carried import carrying
from orpo_dist.model.packed.mixers import find_token_mixers
from orpo_dist.model.patches import COMPILED_BLOCK, Patched, replace_attribute
from orpo_dist.model.upstream import CHECKPOINTS_FORWARD, text_model_of


def compile_blocks(model: nn.Module, *, backend: Any = "inductor", mode: str | None = None) -> list[Patched]:
    """Compile the decoder blocks of `model` (bare, or wrapped by PEFT) in place; returns one handle per block.

    Args:
        backend, mode: as in torch.compile.

    Raises:
        UserError: the model has no block that can be compiled.
    """
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    text_model = text_model_of(base)
    unshared = {id(mixer.module) for mixer in find_token_mixers(text_model) if not mixer.uses_interface}
    blocks = [
        block
        for block in text_model.modules()
        if isinstance(block, GradientCheckpointingLayer) and unshared.isdisjoint(map(id, block.modules()))
    ]
    if not blocks:
        raise UserError(f"torch_compile: {type(base).__name__} has no decoder block to compile. Leave it unset.")
    compile_one = _compile_under_checkpointing if CHECKPOINTS_FORWARD else _compile_call
    return [compile_one(block, backend, mode) for block in blocks]


def _compile_call(block: nn.Module, backend: Any, mode: str | None) -> Patched:
    block.compile(backend=backend, mode=mode, dynamic=True)
    return Patched(COMPILED_BLOCK, lambda: delattr(block, "_compiled_call_impl"))  # torch has no public way back


def _compile_under_checkpointing(block: Any, backend: Any, mode: str | None) -> Patched:
    """A checkpoint inside the compiled code could not break at the attention, and nothing would be compiled. Inside the
    checkpoint is also what holds the layout for a block that drops keywords (model/packed/carried.py)."""
    own_forward = types.MethodType(type(block).forward.__wrapped__, block)
    compiled = torch.compile(own_forward, backend=backend, mode=mode, dynamic=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        with carrying(kwargs.get("orpo_layout")):
            return compiled(*args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if block.gradient_checkpointing and block.training:
            return block._gradient_checkpointing_func(partial(run, **kwargs), *args)
        return run(*args, **kwargs)

    return replace_attribute(block, "forward", forward, COMPILED_BLOCK)
