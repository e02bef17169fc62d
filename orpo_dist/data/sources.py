"""Where rows come from: files, folders, `save_to_disk` folders and the hub."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    ReadInstruction,
    get_dataset_config_names,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from orpo_dist.data.cache import built_once, digest
from orpo_dist.data.files import file_format, read_file
from orpo_dist.data.folders import split_files
from orpo_dist.data.rows import ROW_COLUMN, SOURCE_COLUMN, parquet_schema, save_parquet
from orpo_dist.data.split_names import split_called
from orpo_dist.data.streaming import write_rows
from orpo_dist.distributed.once import built_on_first_rank, is_first_rank
from orpo_dist.errors import UserError
from orpo_dist.options.temporary import is_temporary

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
ROWS_FILE = "rows.arrow"
SLICE = re.compile(r"(?P<name>[^\[]+)(?P<slice>\[.*\])?")


def load_rows(
    path_or_name: str,
    *,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    max_samples: int | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Dataset | IterableDataset:
    """The rows of a file, a folder, a `save_to_disk` folder or a hub data set.

    Rows from files carry `_source` and `_row`, so that messages can name the file and the row. All cells of a CSV file
    are text.

    Args:
        path_or_name: a path, or a hub name, as `name` or `name:config`.
        split: a split, `config:split`, or a slice of it as in `datasets` (`train[:10%]`).
        config: configuration of the hub data set or of a folder's card; in the name or the split it says the same.
        streaming: read row by row; `prepare_pairs` then writes the rows to the cache.
        max_samples: the first so many rows.
        trust_remote_code: only for the message: `datasets` no longer runs the code of a data set.

    Raises:
        UserError: nothing there, or not readable.
    """
    path = Path(path_or_name).expanduser()
    if path.exists():
        config, split = _config_in(str(path), split, config)
        rows = _local(path, split, config, streaming)
    else:
        rows = _hub(path_or_name, split, config, streaming, token, trust_remote_code)
    if max_samples is None:
        return rows
    if max_samples < 1:
        raise UserError(f"max_samples={max_samples} leaves no rows.")
    if isinstance(rows, IterableDataset):
        return rows.take(max_samples)
    return rows.select(range(min(max_samples, len(rows))))


# -- this disk --


def _local(path: Path, split: str, config: str | None, streaming: bool) -> Dataset | IterableDataset:
    if config is not None and (path.is_file() or _saved(path)):
        raise UserError(f"{path} has no card with configurations: config={config} is for data sets of the hub.")
    match = SLICE.fullmatch(split)
    if match is None:
        raise UserError(f"split={split}: not a split.")
    name = match["name"]
    if path.is_dir() and (path / "dataset_dict.json").exists():
        splits = load_from_disk(str(path))
        assert isinstance(splits, DatasetDict)
        called = split_called(name, {str(split): () for split in splits})
        if called is None:
            raise UserError(f"{path}: no split `{name}`. Splits found: {', '.join(splits)}.")
        if called != name:
            _tell([f"{path}: the split `{name}` is `{called}` there."])
        rows = splits[called]
    elif path.is_dir() and (path / "state.json").exists():
        rows = load_from_disk(str(path))
    else:
        files = [path]
        if path.is_dir():
            found = split_files(path, name, config)
            files, name = found.files, found.name
            _tell(found.notes)
        elif name != "train" and file_format(path) != "json" and name not in path.name:
            _tell([f"{path}: one file, without splits: all of its rows are read as the split `{name}`."])
        if streaming and match["slice"] is None:
            return IterableDataset.from_generator(_rows, gen_kwargs={"files": files, "split": name})
        # Once per run, into a memory-mapped file: eight ranks would hold the rows eight times otherwise.
        folder = built_on_first_rank(lambda: _read_into_cache(files, name))
        rows = Dataset.from_file(str(folder / ROWS_FILE))
    assert isinstance(rows, Dataset)
    return _slice(rows, name, match["slice"])


def _saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _tell(notes: list[str]) -> None:
    if notes and is_first_rank():
        print("\n".join(notes), flush=True)


def _read_into_cache(files: list[Path], split: str) -> Path:
    for file in files:
        if file_format(file) is None:
            next(read_file(file, split))  # says which types there are
    name = f"source-{digest(chain([split.encode()], _contents(files)))}"

    def build(folder: Path) -> None:
        if tables := parquet_schema(files):
            save_parquet(files, tables, folder / ROWS_FILE)
        elif not write_rows(_rows(files, split), folder / ROWS_FILE):
            raise UserError(f"{', '.join(map(str, files))}: no rows in it.")

    return built_once(name, build)


def _contents(files: list[Path]) -> Iterator[bytes]:
    """Names and contents, a piece at a time: files with images are large."""
    for file in files:
        yield str(file).encode()
        with file.open("rb") as stream:
            yield from iter(lambda: stream.read(1 << 24), b"")


def _rows(files: list[Path], split: str) -> Iterator[dict[str, Any]]:
    for file in files:
        for number, row in read_file(file, split):
            yield {**row, SOURCE_COLUMN: str(file), ROW_COLUMN: number}


def _slice(rows: Dataset, name: str, part: str | None) -> Dataset:
    if part is None:
        return rows
    try:
        (bounds,) = ReadInstruction.from_spec(f"{name}{part}").to_absolute({name: len(rows)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"split={name}{part}: not a slice of {len(rows)} rows: {error}") from None
    return rows.select(range(bounds.from_, bounds.to))


# -- the hub --


def _hub(
    name: str, split: str, config: str | None, streaming: bool, token: str | None, trust_remote_code: bool
) -> Dataset | IterableDataset:
    if file_format(Path(name)) or not HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such file or folder, and not the name of a data set on the hub.")
    name, _, config_in_name = name.partition(":")
    chosen, split = _config_in(name, split, config, config_in_name)

    def load() -> Dataset | IterableDataset:
        return _load_from_hub(name, chosen, split, streaming, token, trust_remote_code)

    loaded = []

    def load_first() -> Path:
        loaded.append(load())
        return Path.cwd()  # every rank reads the hub's own cache; here it only learns that it is filled

    if not streaming:
        built_on_first_rank(load_first)
    return loaded[0] if loaded else load()


def _config_in(name: str, split: str, *given: str | None) -> tuple[str | None, str]:
    """The configuration, which may be written before the split, and the split without it."""
    before, colon, after = split.partition(":")
    config_in_split = before if colon and "[" not in before else ""
    configs = {config for config in (*given, config_in_split) if config}
    if len(configs) > 1:
        raise UserError(f"{name}: several configurations named at once: {', '.join(sorted(configs))}.")
    return (configs.pop() if configs else None), (after if config_in_split else split)


def _load_from_hub(
    name: str, config: str | None, split: str, streaming: bool, token: str | None, trust_remote_code: bool
) -> Dataset | IterableDataset:
    try:
        return load_dataset(name, config, split=split, streaming=streaming, token=token)
    except (GatedRepoError, DatasetNotFoundError, RepositoryNotFoundError) as error:
        if isinstance(error, GatedRepoError) or "gated" in str(error):
            raise UserError(
                f"{name}: a gated data set. Accept its terms on https://huggingface.co/datasets/{name} and log in "
                "with `hf auth login`."
            ) from None
        raise UserError(
            f"{name}: no such file or folder here, and no data set of that name on the hub (or a private one: "
            "`hf auth login`)."
        ) from None
    except ValueError as error:
        called = _other_word(str(error), split)
        if called not in (None, split):
            _tell([f"{name}: the split `{split}` is `{called}` there."])
            return load_dataset(name, config, split=called, streaming=streaming, token=token)
        raise UserError(f"{name}: {_first_line(error)} {_configs(name, token)}".rstrip()) from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        asked = "trust_remote_code does not change that. " if trust_remote_code else ""
        raise UserError(
            f"{name}: a data set that comes as Python code, which `datasets` no longer runs. {asked}Convert it to "
            "Parquet, or look for its `refs/convert/parquet` revision."
        ) from None
    except OSError as error:  # ConnectionError, OfflineModeIsEnabled and the HTTP errors are among them
        if is_temporary(error):
            raise
        raise UserError(
            f"{name}: the hub cannot be reached and its cache does not have this data set: {_first_line(error)} "
            "Check the network; without one, load it elsewhere once, copy HF_HOME and set HF_HUB_OFFLINE=1."
        ) from None


def _other_word(message: str, split: str) -> str | None:
    """The name that the data set has for the split, from `datasets`' message that it is unknown."""
    unknown, _, known = message.partition("Should be one of")
    if "Unknown split" not in unknown or SLICE.fullmatch(split)["slice"]:  # type: ignore[index]
        return None
    return split_called(split, {name: () for name in re.findall(r"'([^']+)'", known)})


def _configs(name: str, token: str | None) -> str:
    """What may have been meant, when the configuration was wrong or missing."""
    try:
        names = get_dataset_config_names(name, token=token)
    except Exception:  # the list is help with another error: failing to get it must not hide that one
        return ""
    return f"Configurations: {', '.join(names)} (name one as {name}:CONFIG)."


def _first_line(error: Exception) -> str:
    line = str(error).strip().split("\n", 1)[0]
    return line if line.endswith(".") else line + "."
