"""Floating-point operations of a pair, from the shapes of the model's layers."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orpo_dist.model.loading.vision import vision_modules
from orpo_dist.model.upstream import config_value
from orpo_dist.packing.lengths import PairLengths


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
        """Counted on a model before it is wrapped. Quantised and partitioned layers are counted by their features."""
        config = model.config.get_text_config()  # type: ignore[union-attr,operator]
        head = model.get_output_embeddings()  # type: ignore[operator]
        base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        not_counted = vision_modules(base) | (set(head.modules()) if head is not None else set())
        per_token = 0.0
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D) and module not in not_counted:
                per_token += (6.0 if module.weight.requires_grad else 4.0) * _weights(module)
        per_token += sum(_expert_flops(model, config))
        # Many configs have no head_dim, or None, where the heads divide the hidden size.
        width = config_value(config, "head_dim") or config.hidden_size // config.num_attention_heads
        head_trained = head is not None and any(p.requires_grad for p in head.parameters())
        return cls(
            per_token=per_token,
            per_query_key=12.0 * config.num_attention_heads * width * _attention_layers(config),
            per_scored_row=(6.0 if head_trained else 4.0) * config.hidden_size * config.vocab_size,
        )

    def of_pair(self, pair: PairLengths, nll_scope: str) -> float:
        scored = pair.chosen + pair.rejected + (pair.prompt - 1 if nll_scope == "sequence" else 0)
        tokens = self.per_token * pair.shared_tokens
        return tokens + self.per_query_key * pair.query_keys + self.per_scored_row * scored


def _weights(layer: nn.Linear | Conv1D) -> int:
    """By the features: a quantised or partitioned weight has another shape. GPT-2's Conv1D is never quantised."""
    return layer.in_features * layer.out_features if isinstance(layer, nn.Linear) else layer.weight.numel()


def _attention_layers(config: PreTrainedConfig) -> int:
    """Layers in which every token sees every earlier one: not the linear attention, Mamba and convolutions of hybrids.
    A sliding window counts as full attention, which it is for sequences that fit in it."""
    kinds = config_value(config, "layer_types")  # of models whose layers are of several kinds
    if not kinds:
        return config.num_hidden_layers
    return sum(kind.endswith("attention") and kind != "linear_attention" for kind in kinds)


def _expert_flops(model: nn.Module, config) -> Iterable[float]:
    """Mixtures keep their experts as (experts, out, in) parameters, of which a token uses a few."""
    options = config.to_dict()
    experts = options.get("num_experts") or options.get("num_local_experts")
    if experts:
        share = options["num_experts_per_tok"] / experts
        for parameter in model.parameters():
            if parameter.dim() == 3 and parameter.shape[0] == experts:
                yield (6.0 if parameter.requires_grad else 4.0) * parameter.numel() * share
