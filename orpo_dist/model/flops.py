"""Floating-point operations of a pair, from the shapes of the model's layers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orpo_dist.distributed.log import get_logger
from orpo_dist.model.loading.vision import vision_modules
from orpo_dist.model.upstream import config_value, layer_configs
from orpo_dist.packing.lengths import PairLengths

logger = get_logger(__name__)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs per token (linear layers), per query-key pair (attention) and per scored row (head), forward and backward.

    Of the text model only: embeddings are look-ups, and a vision tower is not counted.
    """

    per_token: float
    per_query_key: float
    per_scored_row: float

    @classmethod
    def of(cls, model: nn.Module) -> "ModelFlops":
        """Counted on a model before it is wrapped. Quantised and partitioned layers are counted by their features.

        Zeros, with one line in the log, where the shapes of the layers cannot be read: a figure of the log must not
        stop a run.
        """
        try:
            return cls._counted(model)
        except Exception as error:  # whatever a family's config lacks or holds in another form
            logger.warning(
                "tflops_per_second, mfu and total_flos are 0: the FLOPs of %s cannot be counted (%s: %s).",
                type(model).__name__,
                type(error).__name__,
                error,
            )
            return cls(0.0, 0.0, 0.0)

    @classmethod
    def _counted(cls, model: nn.Module) -> "ModelFlops":
        config = model.config.get_text_config()  # type: ignore[union-attr,operator]
        head = model.get_output_embeddings()  # type: ignore[operator]
        base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        not_counted = vision_modules(base) | (set(head.modules()) if head is not None else set())
        per_token = 0.0
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D) and module not in not_counted:
                per_token += (6.0 if module.weight.requires_grad else 4.0) * _weights(module)
        per_token += sum(_expert_flops(model, config))
        head_trained = head is not None and any(p.requires_grad for p in head.parameters())
        return cls(
            per_token=per_token,
            per_query_key=12.0 * sum(_attention_widths(config)),
            per_scored_row=(6.0 if head_trained else 4.0) * config.hidden_size * config.vocab_size,
        )

    def of_pair(self, pair: PairLengths, nll_scope: str) -> float:
        scored = pair.chosen + pair.rejected + (pair.prompt - 1 if nll_scope == "sequence" else 0)
        tokens = self.per_token * pair.shared_tokens
        return tokens + self.per_query_key * pair.query_keys + self.per_scored_row * scored


def _weights(layer: nn.Linear | Conv1D) -> int:
    """By the features: a quantised or partitioned weight has another shape. GPT-2's Conv1D is never quantised."""
    return layer.in_features * layer.out_features if isinstance(layer, nn.Linear) else layer.weight.numel()


def _attention_widths(config: PreTrainedConfig) -> Iterable[int]:
    """Heads times their size, per layer in which every token sees every earlier one: not the linear attention, Mamba
    and convolutions of hybrids. A sliding window counts as full attention, which it is for sequences that fit in it."""
    kinds = config_value(config, "layer_types") or ["attention"] * config.num_hidden_layers
    for layer, kind in zip(layer_configs(config), kinds, strict=False):
        heads = config_value(layer, "num_attention_heads")  # None for Mamba and RWKV
        if heads and kind.endswith("attention") and kind != "linear_attention":
            # Many configs have no head_dim, or None, where the heads divide the hidden size.
            yield heads * (config_value(layer, "head_dim") or layer.hidden_size // heads)


# Fields of the configs of transformers' mixtures: how many experts a layer has, and how many of them a token uses.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", "moe_topk", "moe_top_k",
    "moe_k",
)  # fmt: skip


def _expert_flops(model: nn.Module, config: PreTrainedConfig) -> Iterable[float]:
    """Mixtures keep their experts as (experts, out, in) parameters, of which a token uses a few. Where the config does
    not say how many, one line in the log says that all are counted."""
    stacked = [parameter for parameter in model.parameters() if parameter.dim() == 3]
    counts = {count for name in _EXPERTS for count in _numbers(config_value(config, name))}
    stacked = [parameter for parameter in stacked if parameter.shape[0] in counts]
    if not stacked:
        return
    used = next((max(found) for name in _EXPERTS_PER_TOKEN if (found := _numbers(config_value(config, name)))), None)
    if used is None:
        logger.warning(
            "tflops_per_second and mfu count every expert: the config of %s has no field that says how many a token "
            "uses.",
            config.model_type,
        )
    for parameter in stacked:
        experts = parameter.shape[0]
        share = 1.0 if used is None else min(used / experts, 1.0)
        yield (6.0 if parameter.requires_grad else 4.0) * parameter.numel() * share


def _numbers(value: Any) -> list[int]:
    """One number, or one per layer (Hunyuan)."""
    return [number for number in (value if isinstance(value, list | tuple) else [value]) if isinstance(number, int)]
