"""Work that is done once per run and kept by content: atomic folders, and one rank working while the others wait.

File locks are not used: on shared file systems they are often absent or wrong. A folder is built under a temporary
name and renamed when it is complete, so whoever sees it sees all of it; of two writers the first wins.

The ranks wait on the key-value store of the process group and not in a collective, whose timeout (10 minutes for
NCCL) a long tokenisation would trip.
"""

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from orpo_dist.errors import UserError

SIZES = ".sizes.json"  # written last: the files of a cache folder
SWEEP_SECONDS = 2 * 24 * 60 * 60
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")


def cache_root() -> Path:
    """$ORPO_DIST_CACHE, else <HF_HOME>/orpo_dist."""
    own = os.environ.get("ORPO_DIST_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "orpo_dist"


def digest(parts: Iterable[bytes]) -> str:
    """A name for content: 128 bits of BLAKE2 over the parts and their lengths, in hexadecimal."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def built_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cache folder `name`, built by `build(temporary folder)` unless it is there already, and whole.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = cache_root() / name
    if _is_whole(folder):
        return folder
    try:
        _sweep(folder.parent)
        if folder.is_dir():
            print(f"{folder}: a part of this cached data is gone (purged?). It is made again.", flush=True)
            _remove(folder)
        _build(folder, build)
    except OSError as error:
        raise UserError(
            f"Cannot write the data cache {folder.parent}: {error}. Set ORPO_DIST_CACHE to a folder with room."
        ) from error
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    temporary = _beside(folder)
    temporary.mkdir(parents=True)
    try:
        build(temporary)
        sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in _files(temporary)}
        (temporary / SIZES).write_text(json.dumps(sizes), encoding="utf-8")
        _sync(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not _is_whole(folder):  # else another run was first, with the same content
                raise
        _sync_one(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether all files are there: the sweepers of shared scratch folders take single ones."""
    try:
        sizes = json.loads((folder / SIZES).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _remove(folder: Path) -> None:
    doomed = _beside(folder)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")


def _sweep(root: Path) -> None:
    """Removes what killed runs have left half built, once nothing in it has changed for two days."""
    if not root.is_dir():
        return
    for path in root.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_dir():
            times = [file.stat().st_mtime for file in [path, *_files(path)]]
            if max(times) < time.time() - SWEEP_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _sync(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for file in files:
            _sync_one(Path(parent) / file)
        _sync_one(Path(parent))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
