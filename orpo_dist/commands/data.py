"""`orpo-dist data check DATA` and `orpo-dist data stats DATA --model NAME`: look at the data without training."""

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_dist.data.audit import DroppedRow, check_bad_rows, count_kinds, write_dropped_rows
from orpo_dist.errors import UserError
from orpo_dist.options.data import ENCODER_DECODER_COMPLETION_LENGTH, PrepareOptions

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from orpo_dist.data.prepare import PreparedPairs

EXAMPLES = 3  # bad rows shown for each kind

_HELP = {
    "max_length": "most tokens of prompt + completion; check: 1024 for text models, stats: no bound; `none`: no bound",
    "max_prompt_length": "most tokens of a prompt",
    "max_completion_length": "most tokens of a completion",
    "truncation_side": "which end of a long prompt is cut off: left or right",
    "on_bad_row": "drop or error",
    "max_bad_rows": "share (below 1) or number of bad rows that is allowed",
    "chat_template": "chatml, zephyr, a Jinja file or the template itself",
    "apply_chat_template": "true: strings become one user and one assistant turn",
    "add_eos_token": "false: completions do not end with EOS",
    "prompt_column": "column of the prompt",
    "chosen_column": "column of the chosen completion",
    "rejected_column": "column of the rejected completion",
    "system_column": "column of the system message",
    "tools_column": "column of the tools",
    "image_column": "column of the images; '' ignores images",
    "image_folder": "folder that image paths start from; default: the folder of the row's file",
    "allow_image_urls": "true: fetch images at http(s) addresses",
    "allow_outside_image_folder": "true: read images outside of the image folder too",
}


def main(argv: list[str]) -> int:
    """Runs the command; returns 0 when the data can be trained on.

    Raises:
        UserError: it cannot, which the command line turns into exit code 2.
    """
    arguments = _parser().parse_args(argv)
    rows = _rows(arguments)
    options = _options(arguments)
    if arguments.action == "stats":
        _stats(arguments, rows, options)
    elif arguments.model is None:
        _check(arguments, rows, options)
    else:
        prepared = _prepared(arguments, rows, options)
        _show(prepared.dropped)
        _show_images(prepared)
        print("The data can be trained on.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="orpo-dist data", description="Look at preference data without training.")
    parser.add_argument("action", choices=["check", "stats"], help="check: is it usable; stats: how long is it")
    parser.add_argument("data", metavar="DATA", help="a file, a folder or a data set of the hub (name or name:config)")
    _add(parser, "model", help="name or folder of the model whose tokenizer is used; stats needs it")
    _add(parser, "model_revision", default="main", help="its revision")
    _add(parser, "trust_remote_code", action="store_true", help="run Python code that the model repository ships")
    _add(parser, "split", default="train", help="split, or config:split (default: train)")
    _add(parser, "config", help="configuration of a hub data set")
    _add(parser, "max_samples", type=int, help="only the first so many rows")
    _add(parser, "batch_size", type=int, default=4, help="stats: pairs of a padded batch (default: 4)")
    _add(parser, "min_pixels", type=int, help="smallest area of an image after resizing (Qwen-VL)")
    _add(parser, "max_pixels", type=int, help="largest area of an image after resizing (Qwen-VL)")
    _add(parser, "dropped_rows", type=Path, help="write the bad rows to this JSON lines file")
    for name, text in _HELP.items():
        _add(parser, name, help=text)
    return parser


def _add(parser: argparse.ArgumentParser, name: str, **settings: object) -> None:
    flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*flags, dest=name, **settings)  # type: ignore[arg-type]


def _rows(arguments: argparse.Namespace) -> "Dataset | IterableDataset":
    from orpo_dist.data.sources import load_rows

    return load_rows(arguments.data, split=arguments.split, config=arguments.config, max_samples=arguments.max_samples)


def _options(arguments: argparse.Namespace) -> PrepareOptions:
    """The options given as flags. `data stats` counts whole pairs: no bound unless one is given."""
    given = {name: getattr(arguments, name) for name in _HELP if getattr(arguments, name) is not None}
    if arguments.action == "stats":
        given.setdefault("max_length", "none")
    types = {f.name: f.type for f in fields(PrepareOptions)}
    return PrepareOptions(**{name: _value(name, text, str(types[name])) for name, text in given.items()})


def _value(name: str, text: str, kind: str) -> Any:
    if "str" in kind:
        return text
    lowered = text.lower()
    if "None" in kind and lowered in ("none", "null"):
        return None
    if "bool" in kind and lowered in ("true", "false"):
        return lowered == "true"
    try:
        return float(text) if "float" in kind else int(text)
    except ValueError:
        raise UserError(f"--{name} {text}: expected {kind.replace('|', 'or')}.") from None


def _prepared(
    arguments: argparse.Namespace, rows: "Dataset | IterableDataset", options: PrepareOptions
) -> "PreparedPairs":
    from orpo_dist.data.prepare import prepare_pairs
    from orpo_dist.model.loading.load import load_config
    from orpo_dist.model.loading.processor import ImageSizes, load_processing_class

    source: dict[str, Any] = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    sizes = ImageSizes(arguments.min_pixels, arguments.max_pixels)
    tokenizer = load_processing_class(arguments.model, **source, sizes=sizes)
    if load_config(arguments.model, **source).is_encoder_decoder:
        limit = options.max_completion_length or ENCODER_DECODER_COMPLETION_LENGTH
        options = replace(options, is_encoder_decoder=True, max_completion_length=limit)
    return prepare_pairs(rows, tokenizer, options, name=arguments.data, dropped_rows_path=arguments.dropped_rows)


def _stats(arguments: argparse.Namespace, rows: "Dataset | IterableDataset", options: PrepareOptions) -> None:
    if arguments.model is None:
        raise UserError("data stats counts tokens: name the model whose tokenizer is used with --model.")
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size {arguments.batch_size}: at least 1.")
    from orpo_dist.data.stats import describe, pair_stats

    prepared = _prepared(arguments, rows, options)
    print(describe(pair_stats(prepared.dataset, arguments.batch_size)))
    _show_images(prepared)


def _check(arguments: argparse.Namespace, rows: "Dataset | IterableDataset", options: PrepareOptions) -> None:
    """What can be said without a tokenizer: the format and the rows that no tokenizer can save."""
    from tqdm import tqdm

    from orpo_dist.data.pairs import Pair
    from orpo_dist.data.prepare import as_dataset, format_of, image_sizes_of, read_pair
    from orpo_dist.data.stats import describe_images, image_stats
    from orpo_dist.images.decode import require_pillow

    name = arguments.data
    dataset = as_dataset(rows, name)
    check_bad_rows([], len(dataset), options, name)
    pair_format = format_of(dataset, options)
    if pair_format.has_images:
        require_pillow("Checking images")
    dropped, sizes = [], []
    for index, row in enumerate(tqdm(dataset, desc="Checking")):
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
    _show(dropped)
    print("The data can be trained on, as far as can be told without a tokenizer; --model NAME checks lengths too.")


def _show_images(prepared: "PreparedPairs") -> None:
    from orpo_dist.data.stats import describe_images, image_stats_of

    stats = image_stats_of(prepared.dataset)
    if stats is not None:
        print("\n".join(["", *describe_images(stats)]))


def _show(dropped: list[DroppedRow]) -> None:
    for kind, count in count_kinds(dropped).items():
        print(f"  {count} x {kind}")
        for row in [row for row in dropped if row.kind == kind][:EXAMPLES]:
            print(f"    {row.describe()}")
