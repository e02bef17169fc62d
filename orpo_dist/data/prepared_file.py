"""The result of a preparation on disk: pairs.arrow, dropped.jsonl and report.json, written as the rows come.

Not `save_to_disk`: it reads what it copies through a memory mapping that stays open, and holds no bad rows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset, Features

from orpo_dist.data.audit import DroppedRow
from orpo_dist.data.rows import BATCH

PAIRS, DROPPED, REPORT = "pairs.arrow", "dropped.jsonl", "report.json"
# What is noted about rows that are kept, by the column that counts it.
NOTED = {"truncated_prompt": "prompt cut", "truncated_completions": "completion cut"}


@dataclass(frozen=True)
class Note:
    """Something about `rows` of the pairs that are kept; `source` and `row` are those of the first."""

    kind: str
    rows: int
    source: str
    row: int


@dataclass(frozen=True)
class PreparedFile:
    """What a folder holds. `counts`: sums over the pairs that are kept of the columns in NOTED."""

    dataset: Dataset
    dropped: list[DroppedRow]
    notes: list[Note]
    format: str
    rows: int
    counts: dict[str, int]


class PreparedWriter:
    """Takes the audited rows part by part; `columns` of the good ones become the pairs.

    A row is audited with its token ids, or with the fields of its DroppedRow: `kind` tells them apart.
    """

    def __init__(self, folder: Path, features: Features, columns: Sequence[str], pair_format: str):
        self.folder = folder
        self.columns = list(columns)
        self.schema = Features({name: features[name] for name in columns}).arrow_schema
        self.rows = self.kept = 0
        self.counts = dict.fromkeys(NOTED, 0)
        self.notes: dict[str, Note] = {}
        self.format = pair_format

    def __enter__(self) -> "PreparedWriter":
        self.sink = pyarrow.OSFile(str(self.folder / PAIRS), "wb")
        self.pairs = pyarrow.ipc.new_stream(self.sink, self.schema)
        self.dropped = (self.folder / DROPPED).open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pairs.close()
        self.sink.close()
        self.dropped.close()
        if kind is not None:
            return
        if not self.kept:  # `datasets` cannot read back a data set of no rows
            (self.folder / PAIRS).unlink()
        report = {
            "columns": self.columns,
            "format": self.format,
            "rows": self.rows,
            "counts": self.counts,
            "notes": [vars(note) for note in self.notes.values()],
        }
        (self.folder / REPORT).write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")

    def add(self, audited: Dataset) -> None:
        for table in audited.with_format("arrow").iter(batch_size=BATCH):
            is_good = pyarrow.compute.is_null(table["kind"])
            good, bad = table.filter(is_good), table.filter(pyarrow.compute.invert(is_good))
            self.pairs.write_table(good.select(self.columns).cast(self.schema))
            for row in bad.select([f.name for f in fields(DroppedRow)]).to_pylist():
                self.dropped.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.rows, self.kept = self.rows + table.num_rows, self.kept + good.num_rows
            for column in NOTED:
                self._note(good, column)
            if "notes" in good.column_names:
                self._note_texts(good)

    def _note(self, good: pyarrow.Table, column: str) -> None:
        numbers = good[column].cast(pyarrow.int64())
        rows = pyarrow.compute.sum(pyarrow.compute.greater(numbers, 0)).as_py()
        if not rows:
            return
        self.counts[column] += pyarrow.compute.sum(numbers).as_py()
        if (before := self.notes.get(column)) is not None:
            self.notes[column] = Note(before.kind, before.rows + rows, before.source, before.row)
            return
        first = good.filter(pyarrow.compute.greater(numbers, 0)).slice(0, 1).select(["source", "row"]).to_pylist()[0]
        self.notes[column] = Note(NOTED[column], rows, **first)

    def _note_texts(self, good: pyarrow.Table) -> None:
        """Counts the notes that rows bring themselves, see TokenizedPair.notes."""
        if not len(pyarrow.compute.list_flatten(good["notes"])):
            return
        for row in good.select(["notes", "source", "row"]).to_pylist():
            for text in row["notes"]:
                before = self.notes.get(text, Note(text, 0, row["source"], row["row"]))
                self.notes[text] = replace(before, rows=before.rows + 1)


def read_prepared(folder: Path) -> PreparedFile:
    """What a PreparedWriter has written to `folder`."""
    report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    with (folder / DROPPED).open(encoding="utf-8") as file:
        dropped = [DroppedRow(**json.loads(line)) for line in file]
    pairs = folder / PAIRS
    none: dict[str, list[int]] = {column: [] for column in report["columns"]}
    return PreparedFile(
        dataset=Dataset.from_file(str(pairs)) if pairs.exists() else Dataset.from_dict(none),
        dropped=dropped,
        notes=[Note(**note) for note in report["notes"]],
        format=report["format"],
        rows=report["rows"],
        counts=report["counts"],
    )
