"""DeepSpeed's checkpoints: loading them without running code from a pickle, and on another number of ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

LATEST_UNIVERSAL = "latest_universal"  # DeepSpeed's own mark of a converted checkpoint
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def safe_pickles() -> Iterator[None]:
    """DeepSpeed loads with weights_only=False, which can run arbitrary code from a pickle. Inside this block only
    tensors and the classes used in its checkpoints are allowed.
    https://docs.pytorch.org/docs/stable/notes/serialization.html"""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def load_universal(accelerator: Accelerator, universal: bool) -> None:
    """Select which of a checkpoint's two forms the engine loads. Call it before the engine is created."""
    plugin: Any = accelerator.state.deepspeed_plugin
    plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = universal


def weight_decays(optimizer: Any) -> list[float]:
    """The weight decay of each parameter group; 0 for norms and biases."""
    return [group["weight_decay"] for group in optimizer.param_groups]


def fix_universal(optimizer: Any, decays: list[float]) -> None:
    """Call it after loading the universal form. DeepSpeed 0.19 gives every parameter group the weight decay of the
    first. Under ZeRO-3 all groups also share one step counter, which then counts one step several times (stage3.py,
    load_hp_checkpoint_state_from_checkpoint_dir_stage3)."""
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
