"""Prepares a loaded model for training: dropout, frozen parts, adapter, compiled blocks."""

from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Sharding, loading_sharding
from orpo_dist.distributed.log import get_logger
from orpo_dist.model.loading.adapters import add_adapter, disable_base_dropout
from orpo_dist.model.loading.vision import freeze, frozen_parts, name_present_layers, without_parts
from orpo_dist.training.borrowed import BorrowedModel
from orpo_dist.training.refusals import warn_without_liger_kernels

logger = get_logger(__name__)


def adapted_model(
    model: nn.Module, args: ORPOConfig, peft_config: Any, borrowed: BorrowedModel
) -> PreTrainedModel | PeftModel:
    """The model set up as `args` requires, before its layout is chosen. Modifies `model` in place; what is to be
    taken off again after training is left with `borrowed`.

    Also sets `args.ddp_find_unused_parameters`, which depends on both.

    Raises:
        UserError: the adapter does not fit, or the model lacks a part that should train.
    """
    if args.disable_dropout:
        borrowed.change(lambda: disable_base_dropout(model))
    adapted = add_adapter(
        model,  # type: ignore[arg-type]
        _with_frozen_parts(model, args, peft_config),
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs=cast(dict | None, args.gradient_checkpointing_kwargs),
        zero3=loading_sharding() is Sharding.ZERO3,
    )
    borrowed.change(lambda: name_present_layers(adapted))
    if args.gradient_checkpointing and args.ddp_find_unused_parameters is None:
        # transformers sets this for plain models only. With an adapter DDP would search for unused parameters, which
        # fails with reentrant checkpointing.
        args.ddp_find_unused_parameters = False
    warn_without_liger_kernels(adapted, args)
    return adapted


def _with_frozen_parts(model: Any, args: ORPOConfig, peft_config: Any) -> Any:
    """Freeze the parts of a vision-language model that do not train. Returns the adapter settings with those parts
    excluded."""
    if isinstance(model, PeftModel):
        if args.train_vision_tower or args.train_projector:
            logger.warning("train_vision_tower and train_projector have no effect: the model already has an adapter.")
        return peft_config
    frozen = frozen_parts(model, train_vision_tower=args.train_vision_tower, train_projector=args.train_projector)
    freeze(model, frozen)
    return without_parts(peft_config, frozen)
