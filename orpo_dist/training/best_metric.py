"""`metric_for_best_model` against the metrics that the evaluations of a run will have, before data is prepared."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers.trainer_utils import IntervalStrategy

from orpo_dist.config import ORPOConfig
from orpo_dist.errors import UserError
from orpo_dist.loss import SUM_NAMES, Objective, metrics_of

# What the Trainer adds to the metrics of an evaluation.
_TRAINERS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def check_best_metric(args: ORPOConfig, eval_dataset: Any, compute_metrics: Callable | None) -> None:
    """The Trainer looks the metric up at the first evaluation, under `eval_NAME`; with several sets `eval_SET_NAME`.

    With `compute_metrics` any name of a set may come to exist.

    Raises:
        UserError: it will not exist.
    """
    asked = args.metric_for_best_model
    if asked is None or eval_dataset is None or args.eval_strategy == IntervalStrategy.NO:
        return
    name = asked if asked.startswith("eval_") else f"eval_{asked}"
    sets = list(eval_dataset) if isinstance(eval_dataset, Mapping) else None
    prefixes = ["eval_"] if sets is None else [f"eval_{each}_" for each in sets]
    if compute_metrics is not None and name.startswith(tuple(prefixes)):
        return
    own = [*metrics_of([1.0] * len(SUM_NAMES), Objective()), *_TRAINERS]
    if name in [prefix + each for prefix in prefixes for each in own]:
        return
    start = "" if sets is None else f" They begin with the name of a set ({', '.join(sets)}), as in {prefixes[0]}loss."
    raise UserError(
        f"metric_for_best_model={asked!r}: no evaluation will have {name}.{start} The metrics are "
        f"{', '.join(own[: -len(_TRAINERS)])}."
    )
