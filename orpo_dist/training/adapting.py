"""A loaded model becomes the one that trains: dropout, frozen parts, adapter, compiled blocks."""

from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Sharding, loading_sharding
from orpo_dist.distributed.log import get_logger
from orpo_dist.model.loading.adapters import add_adapter, disable_base_dropout
from orpo_dist.model.loading.vision import freeze, frozen_parts, name_present_layers, without_parts
from orpo_dist.training.refusals import warn_without_liger_kernels

logger = get_logger(__name__)


def adapted_model(model: nn.Module, args: ORPOConfig, peft_config: Any) -> PreTrainedModel | PeftModel:
    """The model with what `args` asks for, before its layout is chosen. Changes `model`.

    Also settles `args.ddp_find_unused_parameters`, which depends on both.

    Raises:
        UserError: an adapter that does not fit, parts to train that the model lacks.
    """
    if args.disable_dropout:
        disable_base_dropout(model)
    adapted = add_adapter(
        model,  # type: ignore[arg-type]
        _with_frozen_parts(model, args, peft_config),
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs=cast(dict | None, args.gradient_checkpointing_kwargs),
        zero3=loading_sharding() is Sharding.ZERO3,
    )
    name_present_layers(adapted)
    if args.gradient_checkpointing and args.ddp_find_unused_parameters is None:
        # transformers decides so for plain models only; for an adapter DDP would search, which reentrant
        # checkpointing does not survive.
        args.ddp_find_unused_parameters = False
    warn_without_liger_kernels(adapted, args)
    return adapted


def _with_frozen_parts(model: Any, args: ORPOConfig, peft_config: Any) -> Any:
    """Freeze the parts of a vision-language model that are not to train. Returns the settings of the adapter, which
    stays out of them."""
    if isinstance(model, PeftModel):
        if args.train_vision_tower or args.train_projector:
            logger.warning("train_vision_tower and train_projector have no effect: the model has its adapter already.")
        return peft_config
    frozen = frozen_parts(model, train_vision_tower=args.train_vision_tower, train_projector=args.train_projector)
    freeze(model, frozen)
    return without_parts(peft_config, frozen)
