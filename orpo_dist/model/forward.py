"""The forward of a micro-batch of pairs: tensors and layout -> model -> loss and scores."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orpo_dist.errors import UserError
from orpo_dist.loss import Objective, PairScores, orpo_loss
from orpo_dist.model.packed.choose_layout import LayoutChoice
from orpo_dist.model.routers import balancing_loss
from orpo_dist.packing.exchange import sequence_group
from orpo_dist.packing.layout import PackedLayout
from orpo_dist.packing.padded import PaddedLayout, score_padded


@dataclass(frozen=True)
class PairResult:
    """loss: () share of the global batch's loss; None if only scores were requested. scores: per pair."""

    loss: torch.Tensor | None
    scores: PairScores


class PairForward:
    """Runs a model on batches from the collator of the chosen layout."""

    def __init__(self, layout: LayoutChoice, objective: Objective):
        self._layout, self._objective = layout, objective

    def __call__(self, model: nn.Module, batch: dict[str, Any], device: torch.device) -> PairResult:
        """Forward of one micro-batch. Its layout's `tokens` and `pairs` normalise the loss; without them the packed
        layout's loss is of the micro-batch alone and the padded one's is None."""
        layout = batch["orpo_layout"].to(device)
        tensors = {name: value for name, value in batch.items() if name != "orpo_layout"}
        if isinstance(layout, PackedLayout):
            if layout.split is not None:
                layout.split.group = sequence_group(layout.split.where.size)
            with self._layout.in_force(), self._layout.autocast():
                loss = model(**tensors, orpo_layout=layout, use_cache=False)
            assert layout.scores is not None
            if not layout.reached:  # trained on, the pairs of the row would have seen each other
                raise UserError(
                    f"No layer of {self._layout.model_class} receives the packed layout: its "
                    "forward passes no keywords on. Set padding_free=false."
                )
            return PairResult(loss, layout.scores)
        return self._padded(model, tensors, layout)

    def _padded(self, model: nn.Module, tensors: dict[str, Any], layout: PaddedLayout) -> PairResult:
        if not self._layout.scores_by_head(layout):
            return self._from_logits(model, tensors, layout)
        with self._layout.in_force(), self._layout.autocast(), self._layout.image_features_once():
            loss = model(**tensors, orpo_layout=layout, use_cache=False)
        assert layout.scores is not None
        return PairResult(None if layout.tokens is None else loss, layout.scores)

    def _from_logits(self, model: nn.Module, tensors: dict[str, Any], layout: PaddedLayout) -> PairResult:
        coefficient = self._layout.router_aux_loss_coef
        balances_routers = bool(coefficient) and layout.tokens is not None
        if balances_routers:
            tensors["output_router_logits"] = True
        with self._layout.image_features_once():
            outputs = model(**tensors, use_cache=False)
        scores = score_padded(outputs.logits, layout)
        if layout.tokens is None or layout.pairs is None:
            return PairResult(None, scores)
        loss = orpo_loss(scores, self._objective, layout.tokens, layout.pairs)
        if balances_routers:
            share = (scores.weight * scores.nll_tokens).sum() / layout.tokens
            loss = loss + coefficient * share * balancing_loss(outputs)
        return PairResult(loss, scores)
