"""The load-balancing loss of a mixture of experts: whether it is part of the loss, and with what weight."""

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from orpo_dist.distributed.log import get_logger
from orpo_dist.errors import UserError

logger = get_logger(__name__)


def router_aux_loss_coef(model: nn.Module, asked: float | None) -> float:
    """Weight of the load-balancing loss: `asked` if given; else, as in TRL, the model config's where
    `config.output_router_logits` is set, and 0 where it is not.

    https://github.com/huggingface/trl/blob/main/trl/experimental/orpo/orpo_trainer.py (aux_loss_enabled)

    Raises:
        UserError: a weight is given and the model computes no such loss.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config().to_dict()
    outer = base.config.to_dict()
    has_routers = config.get("router_aux_loss_coef") is not None and _computes_aux_loss(type(base))
    if asked is not None:
        if asked and not has_routers:
            raise UserError(
                f"router_aux_loss_coef={asked} needs a model that computes a load-balancing loss; "
                f"{type(base).__name__} does not. Leave it unset."
            )
        return asked
    if not (config.get("output_router_logits") or outer.get("output_router_logits")):
        return 0.0
    coefficient = config.get("router_aux_loss_coef") or 0.0
    if not has_routers:
        logger.warning("output_router_logits has no effect: %s has no load-balancing loss.", type(base).__name__)
        return 0.0
    if not coefficient:
        logger.warning("output_router_logits has no effect on the loss: the config's router_aux_loss_coef is 0.")
    return coefficient


def balancing_loss(outputs: Any) -> torch.Tensor:
    """() the load-balancing loss among the outputs of a forward with `output_router_logits`.

    Raises:
        UserError: there is none, in a model whose forward did not say so (code of a repository).
    """
    loss = outputs.get("aux_loss")
    if loss is None:
        raise UserError(
            "The model's forward returns no load-balancing loss (aux_loss): set router_aux_loss_coef=0, or "
            "output_router_logits=false in its config."
        )
    return loss


def _computes_aux_loss(model_class: type[nn.Module]) -> bool:
    """By the code of its forward: the declared outputs of some (Llama 4) have a field that stays None."""
    return "aux_loss" in inspect.unwrap(model_class.forward).__code__.co_varnames
