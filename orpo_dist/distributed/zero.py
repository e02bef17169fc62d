"""DeepSpeed's config against the run's, and its checkpoints: loading them without running code from a pickle, and on
another number of ranks."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from orpo_dist.distributed.log import get_logger
from orpo_dist.errors import UserError

logger = get_logger(__name__)

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


@contextmanager
def forgetting_broken_configs() -> Iterator[None]:
    """A config that cannot be read registers itself before it fails: every later trainer of the process would ask it.
    https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/deepspeed.py"""
    try:
        yield
    except Exception:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        raise


def check_config(args: Any) -> None:
    """args: TrainingArguments that are complete. Without DeepSpeed nothing is checked.

    transformers finds the same contradictions when training begins, after the data has been prepared.

    Raises:
        UserError: values of DeepSpeed's config that are not those of the run.
    """
    config, contradictions = _config_of(args)
    if contradictions:
        raise UserError(
            f"The DeepSpeed config {_where(args)} contradicts the run: {'; '.join(contradictions)}. Set these values "
            'to "auto" there, or to the run\'s.'
        )
    for section, option, value in (
        ("optimizer", "optim", OptimizerNames(args.optim).value),
        ("scheduler", "lr_scheduler_type", SchedulerType(args.lr_scheduler_type).value),
    ):
        if section in config:
            logger.warning(
                "%s=%s has no effect: the DeepSpeed config has its own %s, %s.",
                option,
                value,
                section,
                config[section].get("type"),
            )


def _config_of(args: Any) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's config, and what transformers would say of it."""
    if args.deepspeed_plugin is None:
        return {}, []
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    if args.deepspeed:
        config, mismatches = args.hf_deepspeed_config.config, args.hf_deepspeed_config.mismatches
    else:  # accelerate's, which the Trainer compares when it makes the accelerator
        tried = HfTrainerDeepSpeedConfig(copy.deepcopy(args.deepspeed_plugin.deepspeed_config))
        tried.trainer_config_process(args, args.auto_find_batch_size)
        args.deepspeed_plugin.set_deepspeed_weakref()  # a config that is made becomes the one that models load by
        config, mismatches = tried.config, tried.mismatches
    # "- ds gradient_clipping=2.0 vs hf max_grad_norm=1.0"
    return config, [line.removeprefix("- ds ").replace(" vs hf ", " against ") for line in mismatches]


def _where(args: Any) -> str:
    file = args.deepspeed if isinstance(args.deepspeed, str) else os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    return file or "of accelerate"
