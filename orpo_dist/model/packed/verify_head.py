"""Compares the loss head with the model's own logits of padded rows, for every model before training.

The head takes a model's logits for its output layer, times a factor, with a softcap. Of a model that computes them
otherwise (several output layers, logits that depend on more than their row's hidden state) it would compute another
loss.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.model.head.call import PairLayout
from orpo_dist.model.head.install import LossHead, scored_hidden
from orpo_dist.model.packed.stations import LEAST_TOLERANCE, Comparison
from orpo_dist.model.packed.verify import FAILURES, LayoutCheck, layout_check, rounding_unit, run_own
from orpo_dist.model.patches import OBSERVED_STATES, add_forward_pre_hook
from orpo_dist.model.upstream import is_failure_of_peers, is_out_of_memory
from orpo_dist.packing.layout import PackedLayoutError
from orpo_dist.packing.padded import PaddedLayout, score_padded

# Tolerance in units of rounding of the largest logit. A model that scales and caps its logits in half precision rounds
# them more often than the head does: 71 text families in bfloat16 were at most 0.04 units apart.
_UNITS = 1.0
_COMPARED = ("chosen_logps", "rejected_logps", "chosen_logits", "rejected_logits")


def verify_head(
    model: nn.Module,
    base: PreTrainedModel,
    head: LossHead,
    batch: dict[str, Any],
    *,
    max_length: int | None,
    compute_dtype: torch.dtype = torch.float32,
) -> LayoutCheck:
    """Score a padded `batch` of tiny pairs from the model's own logits and with the head, from the same hidden states.

    `model` may be wrapped, as in `verify_layout`; every rank must call it: two forwards. The model's attention is its
    own, and no head is on it.
    """
    checked = _CheckedHead(
        base, head.place, head.objective, head.chunk_rows, 0.0, unit=rounding_unit(base, compute_dtype)
    )

    def compare() -> Comparison:
        with checked.put_on():
            run_own(model, base, batch)
        return checked.found

    check = layout_check(
        model, base, compare, max_length=max_length, what="its logits and those of its output layer alone"
    )
    head.transform = checked.transform
    return check


@dataclass
class _CheckedHead(LossHead):
    """A head that also forms the logits and compares. found: what the last forward gave."""

    unit: float = 0.0
    found: Comparison = field(init=False)

    def loss(self, layout: PairLayout, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        assert isinstance(layout, PaddedLayout)
        given: list[torch.Tensor] = []
        # The same forward for both: between two of them a mixture may send a token to another expert.
        with add_forward_pre_hook(self.place.head, _into(given), OBSERVED_STATES):
            outputs = self.model_forward(*args, **{**kwargs, "use_cache": False})
        if len(given) != 1:
            raise PackedLayoutError(f"its forward calls its output layer {len(given)} times")
        try:
            self.hidden(layout, args, kwargs)  # which measures what the model does to its logits
        except PackedLayoutError:
            raise
        except FAILURES as error:
            if is_out_of_memory(error) or is_failure_of_peers(error):
                raise
            raise PackedLayoutError(
                f"its forward fails without its logits ({type(error).__name__}: {error})"
            ) from error
        loss = self.score(scored_hidden(given[0], layout), layout)
        self.found = _compared(layout, outputs.logits, self.unit)
        return loss


def _into(given: list[torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given.append(args[0])

    return hook


def _compared(layout: PaddedLayout, logits: torch.Tensor, unit: float) -> Comparison:
    """`layout.scores`, which the head has written, against those from the logits (2B, L, V). Reads from the device
    once."""
    expected, ours = score_padded(logits, layout), layout.scores
    assert ours is not None and layout.rows is not None
    largest = logits.flatten(0, 1).index_select(0, layout.rows).abs().max().to(expected.chosen_logps.dtype)
    differences = [(getattr(ours, name) - getattr(expected, name)).abs().max() for name in _COMPARED]
    *found, largest = torch.stack([*differences, largest]).nan_to_num(nan=torch.inf).tolist()
    worst = max(range(len(found)), key=found.__getitem__)
    tolerance = max(LEAST_TOLERANCE, _UNITS * unit) * largest + 1e-5
    return Comparison(_COMPARED[worst], found[worst], tolerance)
