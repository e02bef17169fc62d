"""Set-up of ORPOTrainer before any model is loaded: its copy of the config, checks, rows to pairs, layout options."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Environment, Sharding, loading_sharding
from orpo_dist.loss import Objective
from orpo_dist.model.loading.init_kwargs import model_init_kwargs
from orpo_dist.model.loading.wrapped_layers import refuse_unknown_layers
from orpo_dist.model.packed.choose_layout import LayoutChoice
from orpo_dist.packing.lengths import PairLengths, is_tokenised, pair_lengths
from orpo_dist.run.checkpoint import LEAST_KEPT
from orpo_dist.run.prepare import Preparation, preparation_of
from orpo_dist.training import refusals
from orpo_dist.training.best_metric import check_best_metric
from orpo_dist.training.layout_options import layout_options
from orpo_dist.training.optimizer_modes import refuse_modes_under_zero
from orpo_dist.training.overrides import is_overridden, refuse_overrides
from orpo_dist.training.packages import quantization_asked, refuse_missing_packages


@dataclass(frozen=True)
class Setup:
    """A run whose data is ready.

    Attributes:
        args: a copy of the config, so that the trainer can modify it without changing the user's.
        train_rows, eval_rows: tokenised, or None; eval_rows may be a dict of sets.
        lengths: of the training pairs, in order.
        layout: not yet chosen; that needs the model.
        data_collator: of the user.
    """

    args: ORPOConfig
    preparation: Preparation
    train_rows: Any
    eval_rows: Any
    lengths: list[PairLengths]
    objective: Objective
    layout: LayoutChoice
    data_collator: Callable[[list[dict]], dict[str, Any]] | None

    def follow(self, args: ORPOConfig, sharding: Sharding) -> "Setup":
        """The set-up of the same data for options that have changed. Raises UserError as `set_up` does."""
        refusals.refuse_ignored_options(args)
        refusals.refuse_what_needs_logits(args, None)
        objective = objective_of(args)
        environment = Environment.of(args, sharding)
        rows = (self.train_rows, self.eval_rows)
        self.layout.follow(layout_options(args, objective, self.preparation, environment, self.data_collator, *rows))
        return replace(self, args=args, objective=objective)


def set_up(
    given: ORPOConfig | None,
    *,
    model: Any,
    model_init: Any,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    data_collator: Callable[[list[dict]], dict[str, Any]] | None,
    preprocess_logits_for_metrics: Any,
    optimizer: Any,
    compute_metrics: Callable | None,
    trainer_class: type,
) -> Setup:
    """The arguments are those of `ORPOTrainer`; trainer_class is that class or a subclass.

    Raises:
        UserError: contradicting options, or data that cannot be trained on.
    """
    args = ORPOConfig("trainer_output") if given is None else copy.copy(given)
    sharding = loading_sharding()
    refusals.refuse_what_needs_logits(args, preprocess_logits_for_metrics)
    refusals.refuse_unsupported_parallelism(args)
    refusals.refuse_missing_kernels(args, sharding)
    kwargs = model_init_kwargs(args) if isinstance(model, str) else {}
    refuse_missing_packages(args.optim, kwargs.get("attn_implementation"), quantization_asked(kwargs))
    refuse_unknown_layers(model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code)
    refuse_modes_under_zero(str(args.optim), optimizer, sharding)
    refusals.refuse_ignored_options(args)
    refuse_overrides(trainer_class)
    refusals.refuse_contradictions(args, model, model_init, train_dataset is not None or eval_dataset is not None)
    if not any(is_overridden(trainer_class, name) for name in ("evaluate", "_evaluate")):
        check_best_metric(args, eval_dataset, compute_metrics)
    # With a limit of 1, transformers deletes every checkpoint but the best one at the end of training.
    args.save_total_limit = LEAST_KEPT if args.save_total_limit == 1 else args.save_total_limit

    preparation = preparation_of(args, model, processing_class)
    args.max_length = preparation.options.max_length  # which the model card and out-of-memory errors state
    dropped_rows = Path(str(args.output_dir)) / "dropped_rows.jsonl"
    train_rows = tokenised(train_dataset, "train", preparation, dropped_rows)
    if isinstance(eval_dataset, dict):
        eval_rows: Any = {
            name: tokenised(rows, f"eval_{name}", preparation, dropped_rows) for name, rows in eval_dataset.items()
        }
    else:
        eval_rows = tokenised(eval_dataset, "eval", preparation, dropped_rows)

    objective = objective_of(args)
    environment = Environment.of(args, sharding)
    options = layout_options(args, objective, preparation, environment, data_collator, train_rows, eval_rows)
    lengths = pair_lengths(train_rows) if train_rows is not None else []
    if train_rows is not None and not is_overridden(trainer_class, "_get_train_sampler"):
        refusals.refuse_empty_epoch(args, len(lengths), environment.global_batch(args))
    layout = LayoutChoice(options)
    return Setup(args, preparation, train_rows, eval_rows, lengths, objective, layout, data_collator)


def objective_of(args: ORPOConfig) -> Objective:
    return Objective(beta=args.beta, label_smoothing=args.label_smoothing)


def tokenised(rows: Any, name: str, preparation: Preparation, dropped_rows: Path) -> Any:
    """The rows, tokenised; rows that already are, and None, are returned unchanged."""
    if rows is None or is_tokenised(rows):
        return rows
    return preparation.pairs(rows, name, dropped_rows).dataset
