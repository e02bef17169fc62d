"""The files of each split of a local folder, found as `datasets` finds them.

Patterns, words and the card's `configs:` are those of `datasets.data_files` and `datasets.utils.metadata`. Two
things differ: only data files are looked at, so that images and notes beside them name no splits; and a split that
`datasets` would not find is looked for in the files that its patterns leave over, then by its exact name. Files of two
splits are named.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets.data_files import (
    DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
    DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    FILES_TO_IGNORE,
    DataFilesDict,
    _get_data_files_patterns,
    sanitize_patterns,
)
from datasets.utils.metadata import MetadataConfigs
from fsspec.utils import glob_translate
from huggingface_hub import DatasetCard, DatasetCardData

from orpo_dist.data.files import FORMATS, file_format
from orpo_dist.data.split_names import split_called
from orpo_dist.errors import UserError

CARDS = ("README.md", ".huggingface.yaml")  # the second overrides the first, as in datasets.load
SHARD = re.compile(r"-\d{5}-of-\d{5}.*")
OTHER_PACKING = (".arrow", ".zst", ".xz", ".bz2", ".lz4", ".zip")  # `datasets` reads these, files.py does not
# Parameters of a card's configuration that do not change how files.py reads.
HARMLESS = {"data_files", "data_dir", "default", "version", "description", "license", "features"}


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split, in reading order, under the name it has in the folder; and what to tell about them."""

    name: str
    files: list[Path]
    notes: list[str] = field(default_factory=list)


@dataclass
class _Folder:
    splits: dict[str, list[Path]]
    notes: list[str]


def split_files(folder: Path, split: str, config: str | None = None) -> SplitFiles:
    """The data files of a split; `split` may be another word for its name (`split_called`).

    Args:
        config: a configuration of the folder's card; None: its default, where it has several.

    Raises:
        UserError: no such split or configuration, no data files, or a card that cannot be read.
    """
    found = configured = _configured(folder, config)
    if found is None:
        found = _Folder(*_by_name(folder, _data_files(folder)))
    name = split_called(split, found.splits)
    if name is None and configured is None:  # what a card leaves out may be another configuration's
        name = _add_named(folder, split, found)
    if name is None:
        known = ", ".join(sorted(found.splits)) or "none"
        raise UserError(f"{folder}: no files of split `{split}`. Splits found: {known}.")
    notes = [f"{folder}: {note}" for note in [*found.notes, *_doubtful(folder, name, found.splits)]]
    if name != split:
        notes.append(f"{folder}: the split `{split}` is `{name}` there.")
    files = _without_metadata(found.splits[name])
    if left := [path for path in found.splits[name] if path not in files]:
        notes.append(f"{folder}: not read, JSON beside data files of another format: {_names(folder, left)}.")
    return SplitFiles(name, files, notes)


def _data_files(folder: Path) -> list[Path]:
    """All data files below the folder, without those that `datasets` never takes for data."""
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        files += [Path(parent) / name for name in names if name not in FILES_TO_IGNORE and not name.startswith(".")]
    found = sorted(path for path in files if file_format(path) and path.is_file())
    if not found:
        raise UserError(f"{folder}: no data files in it. Looked for {', '.join(FORMATS)}.")
    return found


def _by_name(folder: Path, files: list[Path]) -> tuple[dict[str, list[Path]], list[str]]:
    """The splits that names of files and folders tell, and notes."""
    matching = _matcher(folder, files)

    def resolve(pattern: str) -> list[str]:
        if found := matching([pattern]):
            return [path.as_posix() for path in found]
        raise FileNotFoundError(pattern)

    # get_data_patterns takes no resolver of one's own, and would take an image in train/ for the training data.
    patterns = _get_data_files_patterns(resolve)
    splits = {str(split): matching(globs) for split, globs in patterns.items()}
    directories = {str(split): globs for split, globs in DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME.items()}
    if all(directories.get(split) == globs for split, globs in patterns.items()):
        claimed = {path for of_split in splits.values() for path in of_split}
        rest = _matcher(folder, [path for path in files if path not in claimed])
        for split, globs in DEFAULT_PATTERNS_SPLIT_IN_FILENAME.items():
            if str(split) not in splits and (left := rest(globs)):
                splits[str(split)] = left
    packed = [
        path
        for path in folder.rglob("*")
        if path.suffix in OTHER_PACKING and (path.suffix == ".arrow" or file_format(path.with_suffix("")))
    ]
    notes = [f"not read, a packing that is not supported: {_names(folder, packed)}."] if packed else []
    return splits, notes


def _matcher(folder: Path, files: list[Path]) -> Callable[[list[str]], list[Path]]:
    """Globs -> the files that match, each once. fsspec's own translation of globs, over a folder that is listed once:
    `datasets` lists it for each of about 60 patterns."""
    names = {path.relative_to(folder).as_posix(): path for path in files}

    def matching(globs: list[str]) -> list[Path]:
        found: dict[Path, None] = {}
        for glob in globs:
            expression = re.compile(glob_translate(glob))
            found |= dict.fromkeys(path for name, path in names.items() if expression.match(name))
        return list(found)

    return matching


def _add_named(folder: Path, split: str, found: _Folder) -> str | None:
    """Adds the split whose files or folder are named exactly so (before a shard number), unless another has them."""
    # Where `datasets` sees one split, it holds all files, or all names that begin with its word (train_sft, train_gen).
    claimed = {path for files in found.splits.values() for path in files} if len(found.splits) > 1 else set()
    files = [
        path
        for path in _data_files(folder)
        if path not in claimed
        and split in (SHARD.sub("", path.name).split(".")[0], *path.relative_to(folder).parts[:-1])
    ]
    if not files:
        return None
    found.splits[split] = files
    return split


def _doubtful(folder: Path, name: str, splits: Mapping[str, list[Path]]) -> list[str]:
    """Files of the split that are in another one too, as a name with both words is."""
    notes = []
    for other, files in splits.items():
        if other != name and (both := [path for path in splits[name] if path in files]):
            notes.append(f"in both of the splits `{name}` and `{other}`: {_names(folder, both)}.")
    return notes


def _without_metadata(files: list[Path]) -> list[Path]:
    """`datasets` reads one format per split and takes JSON objects beside tables for what they are: descriptions."""
    tables = [path for path in files if file_format(path) in ("csv", "tsv", "parquet")]
    others = [path for path in files if file_format(path) == "json"]
    return [path for path in files if path not in others] if tables else files


def _names(folder: Path, files: list[Path]) -> str:
    names = [path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path) for path in files]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# -- the card --


def _configured(folder: Path, config: str | None) -> _Folder | None:
    """The splits of a configuration in the folder's card; None where the card has none."""
    configs = _configs(folder)
    if not configs:
        if config is not None:
            raise UserError(f"{folder} has no card with configurations: config={config} is for data sets of the hub.")
        return None
    known = f"Configurations: {', '.join(configs)} (name one with config, or as CONFIG:SPLIT)."
    try:
        name = config or configs.get_default_config_name()
    except ValueError as error:
        raise UserError(f"{folder}: its card: {error}") from None
    if name is None:
        raise UserError(f"{folder}: its card has several configurations and no default. {known}")
    if name not in configs:
        raise UserError(f"{folder}: no configuration `{name}` in its card. {known}")
    given = configs[name]
    base = (folder / (given.get("data_dir") or "")).resolve()
    unused = sorted(given.keys() - HARMLESS)
    notes = [f"not used of its card's configuration `{name}`: {', '.join(unused)}."] if unused else []
    if given.get("data_files") is None:
        splits, more = _by_name(base, _data_files(base))
        return _Folder(splits, notes + more)
    return _Folder(_card_files(folder, base, given["data_files"]), notes)


def _card_files(folder: Path, base: Path, data_files: Any) -> dict[str, list[Path]]:
    try:
        patterns = sanitize_patterns(data_files)
        if remote := [glob for globs in patterns.values() for glob in globs if "://" in glob]:
            raise UserError(f"{folder}: its card names {remote[0]}; only files on this disk are read from a folder.")
        resolved = DataFilesDict.from_patterns(patterns, base_path=base.as_posix())
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{folder}: its card's data_files: {str(error).strip()}") from None
    splits = {}
    for split, names in resolved.items():
        files = list(dict.fromkeys(map(Path, names)))
        splits[split] = [path for path in files if file_format(path)]
        if not splits[split]:
            raise UserError(
                f"{folder}: no data files match {', '.join(patterns[split])} of its card's split `{split}`."
            )
    return splits


def _configs(folder: Path) -> MetadataConfigs:
    data = DatasetCardData()
    for name in CARDS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            if path.suffix == ".md":
                data = DatasetCard.load(path).data
            else:
                given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
                data = DatasetCardData(**(data.to_dict() | given))
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise UserError(f"{path}: not a readable card: {error}") from None
    try:
        return MetadataConfigs.from_dataset_card_data(data)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: its card: {str(error).strip()}") from None
