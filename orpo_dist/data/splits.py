"""Which rows a run trains on and which it evaluates on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_dist.data.prepare import PreparedPairs
from orpo_dist.data.sources import load_rows
from orpo_dist.errors import UserError
from orpo_dist.options.data import DataArguments


@dataclass(frozen=True)
class RunPairs:
    """Tokenised pairs of a run."""

    train: PreparedPairs
    evaluation: PreparedPairs | None


def load_splits(data: DataArguments, seed: int) -> tuple[Any, Any]:
    """Rows to train on, and rows to evaluate on or None.

    Raises:
        UserError: a split of a single file, which would be the training rows again, or too few rows to hold some out.
    """
    if data.dataset_test_split is not None and Path(str(data.dataset_name)).is_file():
        raise UserError(
            f"{data.dataset_name} is one file and has no split {data.dataset_test_split!r} to evaluate on. Leave "
            "dataset_test_split out and hold rows out with test_split_size=0.1, or give a folder with a file per split."
        )

    def rows_of(split: str) -> Any:
        return load_rows(
            str(data.dataset_name),
            split=split,
            config=data.dataset_config,
            streaming=data.dataset_streaming,
            max_samples=data.max_samples,
        )

    rows = rows_of(data.dataset_train_split)
    if data.dataset_test_split is not None:
        return rows, rows_of(data.dataset_test_split)
    if data.test_split_size is None:
        return rows, None
    size = data.test_split_size if data.test_split_size < 1 else int(data.test_split_size)
    if size >= len(rows) or size * len(rows) < 1:
        raise UserError(
            f"test_split_size={data.test_split_size} of {len(rows)} rows leaves no row to train on or to evaluate on."
        )
    held_out = rows.train_test_split(test_size=size, seed=seed)
    return held_out["train"], held_out["test"]
