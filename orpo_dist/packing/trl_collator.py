"""Adapter from a user's data collator, written for TRL's ORPOTrainer, to the padded layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orpo_dist.errors import UserError
from orpo_dist.packing.padded import PaddedLayout

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class TRLCollator:
    """Passes TRL's columns to a collator and reads its padded batch.

    For each row the collator receives `prompt_input_ids`, `chosen_input_ids`, `chosen_labels` (-100 on the prompt), the
    same for rejected, and attention masks. It returns them as padded tensors, like TRL's DPODataCollatorWithPadding.

    Raises:
        UserError: the collator's batch lacks a column that the loss needs.
    """

    collator: Callable[[list[dict]], dict[str, Any]]
    pad_token_id: int
    nll_scope: str

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator([_trl_columns(row) for row in rows])
        needed = [f"{side}_{column}" for side in _SIDES for column in ("input_ids", "attention_mask", "labels")]
        missing = [column for column in needed if column not in batch]
        if missing:
            raise UserError(
                f"data_collator did not return {', '.join(missing)}: a collator for ORPO must return padded tensors "
                f"{', '.join(needed)}. Leave data_collator unset to use the built-in one."
            )
        width = max(batch[f"{side}_input_ids"].shape[1] for side in _SIDES)
        input_ids = _both_sides(batch, "input_ids", width, self.pad_token_id)
        attention_mask = _both_sides(batch, "attention_mask", width, 0)
        labels = _both_sides(batch, "labels", width, -100)
        targets = torch.zeros_like(input_ids)
        targets[:, :-1] = input_ids[:, 1:]
        completion = torch.zeros_like(input_ids, dtype=torch.bool)
        completion[:, :-1] = labels[:, 1:] != -100
        chosen = len(rows)
        nll = completion[:chosen].clone()
        if self.nll_scope == "sequence":
            seen = (attention_mask[:chosen, 1:] == 1) & (attention_mask[:chosen, :-1] == 1)
            # Of the completion what the labels keep: they leave out the turns that the model did not write.
            nll[:, :-1] = seen & (nll[:, :-1] | (nll[:, :-1].cumsum(1) == 0))
        weight = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
        scored = completion.clone()
        scored[:chosen] |= nll
        layout = PaddedLayout(targets * scored, completion, nll, weight, [row["index"] for row in rows])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "orpo_layout": layout}


def _trl_columns(row: dict[str, Any]) -> dict[str, list[int]]:
    prompt = row["prompt_ids"]
    columns = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in _SIDES:
        completion = row[f"{side}_ids"]
        columns[f"{side}_input_ids"] = prompt + completion
        columns[f"{side}_attention_mask"] = [1] * (len(prompt) + len(completion))
        labels = list(completion)
        context = row.get(f"{side}_context") or ()
        for start, stop in zip(context[::2], context[1::2], strict=True):
            labels[start:stop] = [-100] * (stop - start)
        columns[f"{side}_labels"] = [-100] * len(prompt) + labels
    return columns


def _both_sides(batch: dict[str, Any], column: str, width: int, value: int) -> torch.Tensor:
    halves = [batch[f"{side}_{column}"] for side in _SIDES]
    return torch.cat([torch.nn.functional.pad(half, (0, width - half.shape[1]), value=value) for half in halves])
