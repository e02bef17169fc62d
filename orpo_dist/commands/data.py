"""`orpo-dist data check DATA` and `orpo-dist data stats DATA --model NAME`: look at the data without training."""

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

from orpo_dist.data.audit import DroppedRow, check_bad_rows, write_dropped_rows
from orpo_dist.errors import UserError
from orpo_dist.options.data import DataOptions, ImageOptions, PrepareOptions

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from orpo_dist.data.prepare import PreparedPairs
    from orpo_dist.data.prepared_file import Note

EXAMPLES = 3  # bad rows shown for each kind

# The flags that are declared in options/data.py. Their types are those of the annotations: HfArgumentParser writes
# simplified ones into the fields of every dataclass that it parses.
_DECLARED = {f.name: f for kind in (DataOptions, ImageOptions) for f in fields(kind)}
_HINTS = get_type_hints(DataOptions) | get_type_hints(ImageOptions)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"orpo-dist data: {message}.")


def main(argv: list[str]) -> int:
    """Runs the command; returns 0 when the data can be trained on.

    Raises:
        UserError: it cannot, which the command line turns into exit code 2.
    """
    arguments = _parse(argv)
    rows = _rows(arguments)
    if arguments.action == "stats":
        _stats(arguments, rows)
    elif arguments.model is None:
        _check(arguments, rows, _options(arguments))
    else:
        prepared = _prepared(arguments, rows)
        _show_read(arguments, rows, prepared.dropped, prepared.notes)
        _show_images(prepared)
        print("The data can be trained on.")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if not word.startswith("--"):
            continue
        flag = word.split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
        hint = f"Did you mean {close[0]}?" if close else "See orpo-dist data --help."
        raise UserError(f"Unknown option {flag}. {hint}")
    if rest:
        raise UserError(f"{rest[0]!r} does not belong to an option: orpo-dist data check|stats DATA --option value.")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="orpo-dist data", description="Look at preference data without training.", allow_abbrev=False)
    parser.add_argument("action", choices=["check", "stats"], help="check: is it usable; stats: how long is it")
    parser.add_argument("data", metavar="DATA", help="a file, a folder or a data set of the hub (name or name:config)")
    _add(parser, "model", help="name or folder of the model whose tokenizer is used; stats needs it")
    _add(parser, "model_revision", default="main", help="its revision")
    _add(parser, "trust_remote_code", action="store_true", help="run Python code that the model repository ships")
    _add(parser, "split", default="train", help="split, or config:split (default: train)")
    _add(parser, "config", help="configuration of a hub data set")
    _add(parser, "max_samples", type=int, help="only the first so many rows")
    _add(parser, "batch_size", type=int, default=4, help="stats: pairs of a padded batch (default: 4)")
    _add(parser, "dropped_rows", type=Path, help="write the bad rows to this JSON lines file")
    for name, option in _DECLARED.items():
        note = " `data stats` has no bound unless this is given." if name == "max_length" else ""
        _add(parser, name, **(option.metadata | {"help": option.metadata["help"] + note}))
    return parser


def _add(parser: argparse.ArgumentParser, name: str, **settings: object) -> None:
    flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*flags, dest=name, **settings)  # type: ignore[arg-type]


def _rows(arguments: argparse.Namespace) -> "Dataset | IterableDataset":
    from orpo_dist.data.sources import load_rows

    return load_rows(arguments.data, split=arguments.split, config=arguments.config, max_samples=arguments.max_samples)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The declared options that were given as flags. `data stats` counts whole pairs: no bound unless one is given."""
    given = {name: getattr(arguments, name) for name in _DECLARED if getattr(arguments, name) is not None}
    if arguments.action == "stats":
        given.setdefault("max_length", "none")
    return {name: _value(name, text, _HINTS[name]) for name, text in given.items()}


def _options(arguments: argparse.Namespace) -> PrepareOptions:
    names = {f.name for f in fields(PrepareOptions)}
    return PrepareOptions(**{name: value for name, value in _given(arguments).items() if name in names})


def _value(name: str, text: str, hint: Any) -> Any:
    """The text of a flag as the type that the option declares."""
    kinds = get_args(hint) or (hint,)
    lowered = text.lower()
    if any(get_origin(kind) is dict for kind in kinds):
        try:
            return json.loads(text)
        except ValueError:
            raise UserError(f"--{name} {text}: expected a JSON object.") from None
    if str in kinds:
        return text
    if NoneType in kinds and lowered in ("none", "null"):
        return None
    if bool in kinds and lowered in ("true", "false"):
        return lowered == "true"
    try:
        return float(text) if float in kinds else int(text)
    except ValueError:
        expected = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
        raise UserError(f"--{name} {text}: expected {expected}.") from None


def _prepared(arguments: argparse.Namespace, rows: "Dataset | IterableDataset") -> "PreparedPairs":
    from orpo_dist.config import ORPOConfig
    from orpo_dist.run.prepare import preparation_of

    # use_cpu: nothing is trained here, and no accelerator is needed to tokenise.
    args = ORPOConfig(use_cpu=True, trust_remote_code=arguments.trust_remote_code, **_given(arguments))
    preparation = preparation_of(args, arguments.model, revision=arguments.model_revision)
    return preparation.pairs(rows, arguments.data, arguments.dropped_rows)


def _stats(arguments: argparse.Namespace, rows: "Dataset | IterableDataset") -> None:
    if arguments.model is None:
        raise UserError("data stats counts tokens: name the model whose tokenizer is used with --model.")
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size {arguments.batch_size}: at least 1.")
    from orpo_dist.data.stats import describe, pair_stats

    prepared = _prepared(arguments, rows)
    print(describe(pair_stats(prepared.dataset, arguments.batch_size)))
    _show_images(prepared)


def _check(arguments: argparse.Namespace, rows: "Dataset | IterableDataset", options: PrepareOptions) -> None:
    """What can be said without a tokenizer: the format and the rows that no tokenizer can save."""
    from tqdm import tqdm

    from orpo_dist.data.pairs import Pair
    from orpo_dist.data.prepare import as_dataset, format_of, image_sizes_of, read_pair
    from orpo_dist.data.stats import describe_images, image_stats
    from orpo_dist.data.streaming import each_row
    from orpo_dist.images.decode import require_pillow

    name = arguments.data
    dataset = as_dataset(rows, name)
    check_bad_rows([], len(dataset), options, name)
    pair_format = format_of(dataset, options)
    if pair_format.has_images:
        require_pillow("Checking images")
    dropped, sizes = [], []
    for index, row in enumerate(tqdm(each_row(dataset), desc="Checking", total=len(dataset))):
        outcome: Pair | DroppedRow | list[tuple[int, int]] = read_pair(pair_format, row, index)
        if isinstance(outcome, Pair) and outcome.images:
            outcome = image_sizes_of(pair_format, outcome, row, index)
        if isinstance(outcome, DroppedRow):
            dropped.append(replace(outcome, source=outcome.source or name))
        elif isinstance(outcome, list):
            sizes.append(outcome)
    if arguments.dropped_rows is not None:
        write_dropped_rows(arguments.dropped_rows, name, dropped)
    print(f"{name}: {pair_format.description}")
    print(f"{name}: {len(dataset)} rows, {len(dataset) - len(dropped)} usable, {len(dropped)} bad")
    if sizes:
        print("\n".join(describe_images(image_stats(sizes, len(dataset) - len(dropped)))))
    check_bad_rows(dropped, len(dataset), options, name, arguments.dropped_rows)
    _show_read(arguments, dataset, dropped)
    print("The data can be trained on, as far as can be told without a tokenizer; --model NAME checks lengths too.")


def _show_images(prepared: "PreparedPairs") -> None:
    from orpo_dist.data.stats import describe_images, image_stats_of

    stats = image_stats_of(prepared.dataset)
    if stats is not None:
        print("\n".join(["", *describe_images(stats)]))


def _show_read(
    arguments: argparse.Namespace,
    rows: "Dataset | IterableDataset",
    dropped: list[DroppedRow],
    notes: "Sequence[Note]" = (),
) -> None:
    """What was read: files, rows, columns and why, bad rows and notes by kind."""
    from orpo_dist.data.prepare import as_dataset, format_of, sample_of
    from orpo_dist.data.report import describe_columns, describe_dropped, describe_files, describe_notes

    options = _options(arguments)
    dataset = as_dataset(rows, arguments.data)
    pair_format = format_of(dataset, options)
    lines = describe_files(dataset, arguments.data, arguments.split)
    lines += describe_columns(dataset.column_names, sample_of(dataset), pair_format, options)
    print("\n".join([*lines, *describe_dropped(dropped, EXAMPLES), *describe_notes(notes)]))
