"""Methods that a subclass of ORPOTrainer may override: which are honoured, and which are refused by name.

The Trainer's own loop calls most of its methods here too. REFUSED lists those that nothing would call: an override of
them would be ignored in silence. docs/drop_in.md has the whole list.
"""

from itertools import takewhile
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler, SequentialSampler
from transformers import Trainer

from orpo_dist.errors import UserError
from orpo_dist.packing.loader import PairDataLoader

_LOSS = (
    "the loss of a row is computed inside the output layer, chunk by chunk. Its options are beta, label_smoothing and "
    "nll_scope; to add a term, override compute_loss"
)
_BATCH = "micro-batches come from the collator of the layout; pass a data_collator written for TRL's trainer"
_ROWS = "pass rows with prompt_ids, chosen_ids and rejected_ids, which are not tokenised again"
_COLUMNS = "every column of the rows stays, and the collator takes what it needs"
_LOADER = "override get_train_dataloader or _get_train_sampler"

REFUSED: dict[str, str] = {
    "build_tokenized_answer": _ROWS,
    "concatenated_forward": _LOSS,
    "concatenated_inputs": _BATCH,
    "generate_from_model": "generate_during_eval samples replies to fixed prompts",
    "get_batch_logps": _LOSS,
    "get_batch_loss_metrics": _LOSS,
    "odds_ratio_loss": _LOSS,
    "tokenize_row": _ROWS,
    "_get_collator_with_removed_columns": _COLUMNS,
    "_get_dataloader": _LOADER,
    "_get_eval_sampler": "an evaluation takes every pair of its set once: pass another eval_dataset",
    "_get_num_items_in_batch": "the totals of a global batch are those of its layouts",
    "_remove_unused_columns": _COLUMNS,
    "_set_signature_columns_if_needed": _COLUMNS,
    "_shift_right": _BATCH,
}


def is_overridden(trainer_class: type, name: str) -> bool:
    """Whether `trainer_class`, or a class between it and ORPOTrainer, defines the method."""
    below = takewhile(lambda parent: not parent.__module__.startswith("orpo_dist."), trainer_class.__mro__)
    return any(name in vars(parent) for parent in below)


def refuse_overrides(trainer_class: type) -> None:
    """Raises UserError if `trainer_class` overrides a method that would never be called."""
    for name, instead in REFUSED.items():
        if is_overridden(trainer_class, name):
            raise UserError(f"{trainer_class.__name__}.{name} would never be called here: {instead}.")


def sampler_of(trainer: Trainer) -> "Sampler[int] | None":
    """What a subclass's `_get_train_sampler` returns; None without one.

    Raises:
        UserError: it yields batches, or the part of one rank: global batches are cut and shared out afterwards.
    """
    if not is_overridden(type(trainer), "_get_train_sampler"):
        return None
    sampler: Any = trainer._get_train_sampler(trainer.train_dataset)
    if sampler is None:  # the order of the rows, as in a DataLoader without sampler
        return SequentialSampler(trainer.train_dataset)  # type: ignore[arg-type]
    if isinstance(sampler, BatchSampler):
        raise UserError("_get_train_sampler returns a batch sampler: return one that yields the positions of rows.")
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        raise UserError(
            "_get_train_sampler returns the rows of one rank (DistributedSampler): return the order of all rows, which "
            "is shared out over the ranks afterwards."
        )
    return sampler


def check_evaluation_loader(loader: DataLoader) -> None:
    """Raises UserError for a loader that is not the trainer's own, with which a pair might count twice."""
    if not isinstance(loader, PairDataLoader):
        raise UserError(
            f"The evaluation loader is a {type(loader).__name__} made elsewhere, in which ranks may share pairs: let "
            "get_eval_dataloader return super().get_eval_dataloader(rows)."
        )
