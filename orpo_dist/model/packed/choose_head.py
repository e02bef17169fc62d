"""Chooses how the loss of padded rows is computed: with the loss head if the model takes it, else from full logits.

A packed row has no other way than the head, so a model that does not take it runs padded.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.distributed.agree import first_objection
from orpo_dist.distributed.log import get_logger
from orpo_dist.loss import Objective
from orpo_dist.model.head.install import LossHead, loss_head
from orpo_dist.model.packed.verify import tiny_rows
from orpo_dist.model.packed.verify_head import verify_head
from orpo_dist.packing.layout import PackedLayoutError
from orpo_dist.packing.padded import EncoderDecoderCollator, PaddedCollator, PaddedLayout

logger = get_logger(__name__)


class HeadChoice:
    """The loss head of a run.

    Attributes:
        head: None if the loss comes from full logits. reason: why.
    """

    def __init__(self, model: Any, objective: Objective, *, chunk_rows: int | None, router_aux_loss_coef: float):
        self.head: LossHead | None = None
        self.reason = ""
        self.checked = False
        self._said = False
        try:
            self.head = loss_head(model, objective, chunk_rows=chunk_rows, router_aux_loss_coef=router_aux_loss_coef)
        except PackedLayoutError as error:
            self.reason = str(error).removesuffix(".")

    def check(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        batch: dict[str, Any] | None,
        autocast: Callable[[], AbstractContextManager],
        *,
        max_length: int | None,
        compute_dtype: torch.dtype,
    ) -> str:
        """Compare the head with the model's own logits, once; every rank calls it with the model as it will run.
        Returns why it is given up, "" if it is not.

        batch: padded pairs; None for tiny ones of text.
        """
        if self.head is None or self.checked:
            return ""
        self.checked = True
        batch = tiny_batch(base) if batch is None else batch
        with autocast():
            found = verify_head(model, base, self.head, batch, max_length=max_length, compute_dtype=compute_dtype)
        self.reason = first_objection(found.reason)
        if self.reason:
            self.head = None
        return self.reason

    def takes(self, layout: PaddedLayout) -> bool:
        """Whether the loss of this batch comes from the head."""
        if self.head is None:
            return False
        if layout.rows is None and not self._said:
            self._said = True
            logger.warning(
                "Full logits for some batches: the data_collator's labels leave a completion without a scored token, "
                "or score tokens that its attention mask leaves out."
            )
        return layout.rows is not None


def tiny_batch(base: PreTrainedModel) -> dict[str, Any]:
    """Padded pairs of ordinary tokens, as the model takes them."""
    rows: Sequence[dict[str, Any]] = tiny_rows(base)
    if not base.config.is_encoder_decoder:
        return PaddedCollator(0, "sequence")(rows)
    return EncoderDecoderCollator(0, base.config.decoder_start_token_id)(rows)
