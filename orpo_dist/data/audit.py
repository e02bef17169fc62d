"""Rows that cannot be trained on: why, which, how many are allowed, and what would keep them."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from orpo_dist.errors import UserError
from orpo_dist.options.data import PrepareOptions

# What to do about each kind of bad row. The kinds are the names that counts are printed under.
ADVICE = {
    "empty completion": "Give the row an answer, or take it out.",
    "identical pair": "A pair without a difference teaches nothing: take the row out.",
    "identical after truncation": "Raise max_length or max_completion_length, so that the difference is kept.",
    "prompt too long": "Set max_prompt_length to cut long prompts, or raise max_length.",
    "empty prompt": "Give the row a prompt; this tokenizer has no BOS token that could stand in for it.",
    "no common prompt": "Name the column of the prompt with prompt_column.",
    "missing value": "Fill in the value, or take the row out.",
    "NaN": "Fill in the value, or take the row out (a table's empty cell is often read as NaN).",
    "broken text": "Write the text again from its source: part of a character is missing.",
    "wrong type": "Store text, or a list of messages with `role` and `content`.",
    "bad message": "Correct the message list.",
    "bad tools": "Store the tools as a list of JSON schemas, or as its JSON text.",
    "needs a template": "Set apply_chat_template=true, or leave the column out (system_column='', tools_column='').",
    "rendered already": "Store the plain text of each turn, or rows of text with apply_chat_template unset: they are "
    "used as they are.",
    "chat template": "Correct the row, or use another chat_template.",
    "template without a boundary": "The row is not to blame: use another chat_template.",
    "dropped by the template": (
        "Use a chat_template that renders it, or set allow_template_drops=true to train on what this one keeps."
    ),
    "bad template arguments": "Store chat_template_kwargs as an object with the template's own variables.",
    "missing image": "Correct the path (image_folder is the folder that paths start from), or take the row out.",
    "unreadable image": "Store the image as PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000.",
    "truncated image": "Fetch or write the image again: it ends too early.",
    "image too large": "Scale the image down: at most 128 MiB encoded and 89 million pixels.",
    "image outside": "Set image_folder to the folder that holds the images, or allow_outside_image_folder=true.",
    "image URL": "Download the images first, or set allow_image_urls=true to fetch them once.",
    "image count": "Give the row as many images as it has placeholders, or no placeholder at all.",
    "image in a completion": "Images belong to the prompt: the model answers with text.",
    "media not read": "Images are read from the image column and from messages. Take the rest out, or train on the "
    "text alone with image_column=''.",
    "media token": "Take the token out of the text: it stands for an image, a video or a sound that is not there.",
    "image processor": "Take the row out, or store the image in another size.",
    "images too long": "Lower the processor's image size (max_pixels), or raise the limit on tokens.",
    "images without a processor": "Choose a vision-language model, or ignore the images with image_column=''.",
}


@dataclass(frozen=True)
class DroppedRow:
    """A bad row and where it came from.

    `row` is the line of a JSONL file, the number of the record in another file (from 1), or the index in a
    `datasets` object or list (from 0); `source` names the file, or the data set where there is no file.
    """

    source: str
    row: int
    column: str | None
    kind: str
    reason: str

    def describe(self) -> str:
        column = f", column `{self.column}`" if self.column else ""
        return f"{self.source}, row {self.row}{column}: {self.reason}"


def stop_at(dropped: DroppedRow) -> UserError:
    """The error of `on_bad_row="error"`."""
    return UserError(
        f"{dropped.describe()} ({dropped.kind}).\n"
        f"{ADVICE[dropped.kind]} With on_bad_row=drop such rows are left out and reported."
    )


def count_kinds(dropped: list[DroppedRow]) -> dict[str, int]:
    """Number of dropped rows by kind, most frequent first."""
    return dict(Counter(row.kind for row in dropped).most_common())


def check_bad_rows(
    dropped: list[DroppedRow], rows: int, options: PrepareOptions, name: str, report: Path | None = None
) -> None:
    """Stops the run where too few rows are left.

    Raises:
        UserError: a bad row with on_bad_row="error"; more bad rows than max_bad_rows allows; no row left.
    """
    if rows == 0:
        raise UserError(f"{name}: the data set has no rows.")
    if dropped and options.on_bad_row == "error":
        raise stop_at(dropped[0])
    allowed = int(options.max_bad_rows * rows if options.max_bad_rows < 1 else options.max_bad_rows)
    nothing_left = len(dropped) == rows
    if len(dropped) <= allowed and not nothing_left:
        return
    kinds = count_kinds(dropped)
    if nothing_left:
        lines = [f"{name}: no rows left: all {rows} rows are bad."]
    else:
        limit = f"{options.max_bad_rows:g} ({allowed} rows)" if 0 < options.max_bad_rows < 1 else str(allowed)
        lines = [f"{name}: {len(dropped)} of {rows} rows are bad, more than max_bad_rows={limit} allows."]
    for kind, count in kinds.items():
        first = next(row for row in dropped if row.kind == kind)
        lines.append(f"  {count} x {kind}. First: {first.describe()}")
        lines.append(f"    {ADVICE[kind]}")
    if report is not None:
        lines.append(f"All of them are listed in {report}.")
    if not nothing_left:
        lines.append(f"To train without them set max_bad_rows={len(dropped)}.")
    raise UserError("\n".join(lines))


def write_dropped_rows(path: Path, name: str, dropped: list[DroppedRow]) -> None:
    """Writes the dropped rows of data set `name` as JSON lines; those of other data sets in the file stay."""
    kept = []
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["dataset"] != name]
    lines = kept + [json.dumps({"dataset": name, **asdict(row)}, ensure_ascii=False) for row in dropped]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)
