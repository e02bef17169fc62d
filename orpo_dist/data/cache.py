"""Work that is done once per run and kept by content: atomic folders, and one rank working while the others wait.

File locks are not used: on shared file systems they are often absent or wrong. A folder is built under a temporary
name and renamed when it is complete, so whoever sees it sees all of it; of two writers the first wins.

The ranks wait on the key-value store of the process group and not in a collective, whose timeout (10 minutes for
NCCL) a long tokenisation would trip.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from orpo_dist.errors import UserError


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
    """The cache folder `name`, built by `build(temporary folder)` unless it is there already.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = cache_root() / name
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        try:
            build(temporary)
            _sync(temporary)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.is_dir():  # else another run was first, with the same content
                    raise
            _sync_one(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"Cannot write the data cache {folder.parent}: {error}. Set ORPO_DIST_CACHE to a folder with room."
        ) from error
    return folder


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
