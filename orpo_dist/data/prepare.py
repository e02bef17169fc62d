"""Rows -> tokenised data set: detection, audit, tokenisation, once per run and cached by content.

This is what a trainer calls before it loads a model. The result has the list columns `prompt_ids` (P),
`chosen_ids` (C), `rejected_ids` (R), and `row`, the number of the source row; with a processor also the columns of
`TokenizedImagePair`, which its collator reads.
"""

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, Features, IterableDataset, Value
from datasets import List as ListOf
from transformers import ProcessorMixin

from orpo_dist.data.audit import DroppedRow, check_bad_rows, count_kinds, stop_at, write_dropped_rows
from orpo_dist.data.cache import built_once, cache_root, digest
from orpo_dist.data.chat_template import ProcessingClass, resolve_chat_template
from orpo_dist.data.detect import SAMPLE, detect_format
from orpo_dist.data.media_columns import refuse_lookalikes
from orpo_dist.data.messages import decode
from orpo_dist.data.objects import rows_of
from orpo_dist.data.pairs import Pair, PairFormat
from orpo_dist.data.prepared_file import NOTED, Note, PreparedWriter, read_prepared
from orpo_dist.data.rows import (
    ROW_COLUMN,
    SOURCE_COLUMN,
    dataset_from_rows,
    materialise,
    undecoded,
)
from orpo_dist.data.streaming import content_digest, each_row, in_parts
from orpo_dist.data.tokenize import PairTokenizer, TokenizedPair
from orpo_dist.data.tokenize_images import ImagePairTokenizer
from orpo_dist.data.tokenizer_identity import tokenizer_digest
from orpo_dist.distributed.once import built_on_first_rank, is_first_rank
from orpo_dist.errors import BadRow, UserError
from orpo_dist.images import torchvision
from orpo_dist.images.decode import StoredImage, image_identity, open_image, require_pillow
from orpo_dist.images.source import fetch_all, is_url
from orpo_dist.options.data import PrepareOptions, asked_length
from orpo_dist.version import __version__

__all__ = ["DroppedRow", "PrepareOptions", "PreparedPairs", "prepare_pairs"]

TOKEN_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]
CONTEXT_COLUMNS = ["chosen_context", "rejected_context"]  # see TokenizedPair
BATCH, IMAGE_BATCH = 256, 16  # rows; decoded photographs are large
IMAGE_COLUMNS = ["images", "prompt_text", "prompt_places", "image_sizes", "image_tokens"]

LAYOUT = 5  # of a folder in the cache, see prepared_file.py

Rows: TypeAlias = Dataset | IterableDataset | Sequence[dict[str, Any]]

_FEATURES = Features(
    {
        **{name: ListOf(Value("int32")) for name in [*TOKEN_COLUMNS, *CONTEXT_COLUMNS]},
        "notes": ListOf(Value("string")),
        "row": Value("int64"),
        "truncated_prompt": Value("bool"),
        "truncated_completions": Value("int8"),
        "source": Value("string"),
        "column": Value("string"),
        "kind": Value("string"),
        "reason": Value("string"),
    }
)
_IMAGE_FEATURES = Features(
    {
        **_FEATURES,
        # Not datasets.Image: saving would copy the files that paths name into the cache.
        "images": ListOf({"bytes": Value("large_binary"), "path": Value("string")}),
        "prompt_text": Value("string"),
        "prompt_places": ListOf(Value("int32")),
        "image_sizes": ListOf(ListOf(Value("int32"))),
        "image_tokens": Value("int32"),
    }
)


@dataclass(frozen=True)
class PreparedPairs:
    """Tokenised pairs and what became of the rows. `rows`: before the audit. `truncated_completions` counts
    completions (at most two per pair), `truncated_prompts` prompts. `notes`: what is worth knowing of pairs that are
    trained on."""

    dataset: Dataset
    dropped: list[DroppedRow]
    format: str
    rows: int
    truncated_completions: int
    truncated_prompts: int
    notes: list[Note] = field(default_factory=list)

    def summary(self, name: str) -> str:
        """The counts as one or two lines for the terminal."""
        parts = [f"{self.rows} rows", f"{len(self.dataset)} pairs kept"]
        if self.dropped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in count_kinds(self.dropped).items())
            parts.append(f"{len(self.dropped)} dropped ({kinds})")
        if self.truncated_prompts:
            parts.append(f"{self.truncated_prompts} prompts cut")
        if self.truncated_completions:
            parts.append(f"{self.truncated_completions} completions cut")
        lines = [self.format, ", ".join(parts)]
        lines += [
            f"{note.rows} rows: {note.kind} (first: {note.source}, row {note.row})"
            for note in self.notes
            if note.kind not in NOTED.values()
        ]
        return "\n".join(f"{name}: {line}" for line in lines)


def prepare_pairs(
    dataset: Rows,
    tokenizer: ProcessingClass,
    options: PrepareOptions,
    *,
    name: str = "train",
    dropped_rows_path: Path | None = None,
) -> PreparedPairs:
    """Audits and tokenises preference data; every rank of a run calls it with the same arguments.

    Rank 0 does the work once and the others read its result from the cache ($ORPO_DIST_CACHE or <HF_HOME>/orpo_dist).
    A data set that has prompt_ids, chosen_ids and rejected_ids already is passed through.

    Args:
        dataset: rows in any supported format (docs/data.md). A streaming data set is written to the cache first.
        tokenizer: the tokenizer, or the processor of a vision-language model. Used as it is; its chat template may be
            replaced by `options.chat_template`, without changing it.
        name: what messages call this data set.
        dropped_rows_path: JSON lines file that lists the rows left out.

    Raises:
        UserError: unusable data or contradicting options, on every rank, with the same message.
    """
    dataset = rows_of(dataset, name)
    options = replace(options, max_length=asked_length(options.max_length, isinstance(tokenizer, ProcessorMixin)))
    if isinstance(dataset, Dataset) and set(TOKEN_COLUMNS) <= set(dataset.column_names):
        return PreparedPairs(dataset, [], "token ids", len(dataset), 0, 0)
    folder = built_on_first_rank(lambda: _prepared_folder(dataset, tokenizer, options, name))
    prepared = _read(folder, name)
    if is_first_rank():
        if dropped_rows_path is not None:
            write_dropped_rows(dropped_rows_path, name, prepared.dropped)
        print(prepared.summary(name), flush=True)
    check_bad_rows(prepared.dropped, prepared.rows, options, name, dropped_rows_path)
    return prepared


def as_dataset(rows: Rows, name: str) -> Dataset:
    """The rows as a `Dataset`; a stream is written to the cache, with a message."""
    if isinstance(rows, Dataset):
        return undecoded(rows)
    if not isinstance(rows, IterableDataset):
        return dataset_from_rows(rows_of(rows, name))
    if rows.features is not None:
        rows = rows.decode(False)
    print(f"{name}: a streaming data set. ORPO's batches need all rows, so it is read once into {cache_root()}.")
    temporary = cache_root() / f".stream.{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        file = materialise(rows, temporary)
        with file.open("rb") as stream:
            content = digest(iter(lambda: stream.read(1 << 20), b""))
        folder = built_once(f"rows-{content}", lambda folder: os.rename(file, folder / file.name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Dataset.from_file(str(folder / file.name))


def format_of(rows: Dataset, options: PrepareOptions) -> PairFormat:
    """The format of the rows, from their columns and the first of them.

    Raises:
        UserError: as `detect_format`.
    """
    return detect_format(rows.column_names, sample_of(rows), options)


def sample_of(rows: Dataset) -> list[dict[str, Any]]:
    """The rows that the format is detected from."""
    return list(islice(rows, SAMPLE))


def read_pair(pair_format: PairFormat, row: dict[str, Any], index: int) -> Pair | DroppedRow:
    """The pair of row number `index`, or why it is none. `source` is empty where the row is from no file."""
    try:
        return pair_format.pair(row)
    except BadRow as bad:
        return _dropped(bad, row, index)


def image_sizes_of(
    pair_format: PairFormat, pair: Pair, row: dict[str, Any], index: int
) -> list[tuple[int, int]] | DroppedRow:
    """Width and height of each image of a pair, or why one cannot be read."""
    column = pair_format.image or pair_format.prompt or pair_format.chosen
    try:
        fetched = fetch_all(pair.images, column)
        return [open_image(_here(image, fetched), column).size for image in pair.images]
    except BadRow as bad:
        return _dropped(bad, row, index)


def _here(image: StoredImage, fetched: dict[str, StoredImage | BadRow]) -> StoredImage:
    here = fetched[str(image["path"])] if is_url(image) else image
    if isinstance(here, BadRow):
        raise here
    return here


def _dropped(bad: BadRow, row: dict[str, Any], index: int) -> DroppedRow:
    return DroppedRow(decode(row.get(SOURCE_COLUMN)) or "", _number(row, index), bad.column, bad.kind, bad.reason)


def _number(row: dict[str, Any], index: int) -> int:
    return decode(row[ROW_COLUMN]) if ROW_COLUMN in row else index


def _prepared_folder(dataset: Rows, tokenizer: ProcessingClass, options: PrepareOptions, name: str) -> Path:
    rows = as_dataset(dataset, name)
    if len(rows) == 0:
        raise UserError(f"{name}: the data set has no rows.")
    pair_format = format_of(rows, options)
    _check_images(pair_format, tokenizer, options, name)
    read = pair_format.columns + [column for column in (SOURCE_COLUMN, ROW_COLUMN) if column in rows.column_names]
    rows = rows.select_columns(read)
    settings = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in options.NOT_IN_CACHE_KEY}
    identity = [
        f"{__version__}, layout {LAYOUT}",
        content_digest(rows),
        tokenizer_digest(tokenizer),
        resolve_chat_template(options.chat_template, tokenizer) or "",
        json.dumps(settings, sort_keys=True),
        json.dumps({k: v for k, v in asdict(pair_format).items() if k != "description"}, sort_keys=True),
    ]
    parts = [part.encode() for part in identity]
    if isinstance(tokenizer, ProcessorMixin):
        tokenize: PairTokenizer = ImagePairTokenizer(tokenizer, pair_format, options)
        parts += _image_files(pair_format, rows)
    else:
        tokenize = PairTokenizer(tokenizer, pair_format, options)
    step = _Step(tokenize, pair_format, options, name)
    return built_once(f"pairs-{digest(parts)}", lambda folder: _build(folder, rows, step, options, name))


def _check_images(pair_format: PairFormat, tokenizer: ProcessingClass, options: PrepareOptions, name: str) -> None:
    if isinstance(tokenizer, ProcessorMixin):
        require_pillow("A vision-language model")
        refuse_lookalikes(pair_format.media, name)
    elif pair_format.has_images or options.image_column:
        where = f"image_column={pair_format.image}" if pair_format.image else "its messages"
        problem = torchvision.problem()
        needs = f"; many need torchvision, and {problem}: {torchvision.remedy()}" if problem else ""
        raise UserError(
            f"{name}: the rows have images ({where}), and the model reads text only. Choose a vision-language model, "
            "or set image_column='' to train on the text alone. If the model is one, its processor could not be "
            f"loaded, and a warning above says why{needs}."
        )


def _image_files(pair_format: PairFormat, rows: Dataset) -> list[bytes]:
    """What the cache's key must know of the image files that rows name by path: their content is not in the rows."""
    known: dict[str, list[bytes]] = {}
    for index, row in enumerate(each_row(rows)):
        pair = read_pair(pair_format, row, index)
        for image in pair.images if isinstance(pair, Pair) else ():
            if image["path"] and image["path"] not in known:
                known[image["path"]] = image_identity(image)
    return [part for parts in known.values() for part in parts]


def _build(folder: Path, rows: Dataset, step: "_Step", options: PrepareOptions, name: str) -> None:
    with PreparedWriter(folder, step.features, step.columns, step.format.description) as writer:
        for part in in_parts(rows):
            start, end = writer.rows, writer.rows + len(part)
            audited = part.map(
                step,
                batched=True,
                batch_size=IMAGE_BATCH if step.has_images else BATCH,
                writer_batch_size=IMAGE_BATCH if step.has_images else None,
                with_indices=True,
                fn_kwargs={"start": start},
                remove_columns=rows.column_names,
                features=step.features,
                num_proc=options.dataset_num_proc,
                load_from_cache_file=False,
                cache_file_name=str(folder / "audited.arrow"),
                new_fingerprint=f"audited{start}",  # else the tokenizer is hashed for a name that nobody reads
                desc=f"Tokenising {name}"
                + (f", rows {start} to {end} of {len(rows)}" if end - start < len(rows) else ""),
            )
            writer.add(audited)
            for file in folder.glob("audited*.arrow"):
                file.unlink()


def _read(folder: Path, name: str) -> PreparedPairs:
    found = read_prepared(folder)
    return PreparedPairs(
        dataset=found.dataset,
        dropped=[replace(row, source=row.source or name) for row in found.dropped],
        format=found.format,
        rows=found.rows,
        truncated_completions=found.counts["truncated_completions"],
        truncated_prompts=found.counts["truncated_prompt"],
        notes=[replace(note, source=note.source or name) for note in found.notes],
    )


class _Step:
    """One batch of rows -> one batch of tokenised or bad rows; a class, so that `map` can send it to processes."""

    def __init__(self, tokenize: PairTokenizer, pair_format: PairFormat, options: PrepareOptions, name: str):
        self.tokenize = tokenize
        self.format = pair_format
        self.options = options
        self.name = name
        self.has_images = isinstance(tokenize, ImagePairTokenizer)
        self.features = _IMAGE_FEATURES if self.has_images else _FEATURES
        self.columns = [*TOKEN_COLUMNS, *CONTEXT_COLUMNS, "row", *(IMAGE_COLUMNS if self.has_images else [])]

    def __call__(self, batch: dict[str, list[Any]], indices: list[int], start: int = 0) -> dict[str, list[Any]]:
        """`start`: the index of the first row of the part that `map` was given."""
        indices = [start + index for index in indices]
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        read = [read_pair(self.format, row, index) for row, index in zip(rows, indices, strict=True)]
        tokenized = iter(self.tokenize([pair for pair in read if isinstance(pair, Pair)]))
        result: dict[str, list[Any]] = {column: [] for column in self.features}
        for row, index, item in zip(rows, indices, read, strict=True):
            outcome = next(tokenized) if isinstance(item, Pair) else item
            if isinstance(outcome, BadRow):
                outcome = _dropped(outcome, row, index)
            if isinstance(outcome, DroppedRow) and self.options.on_bad_row == "error":
                raise stop_at(replace(outcome, source=outcome.source or self.name))
            for column, value in self._record(outcome, row, index).items():
                result[column].append(value)
        return result

    def _record(self, outcome: TokenizedPair | DroppedRow, row: dict[str, Any], index: int) -> dict[str, Any]:
        record: dict[str, Any] = dict.fromkeys(self.features)
        record["row"] = _number(row, index)
        record["source"] = decode(row.get(SOURCE_COLUMN)) or ""
        return record | vars(outcome)
