"""Atomic checkpoints: written to a staging folder, sealed with a manifest, then renamed into place.

    RUN/_saving/checkpoint-N/...     every rank writes its files here
    RUN/_saving/checkpoint-N/complete.json   written last: files, sizes, checksums, fingerprint
    RUN/checkpoint-N/                one rename, after every node has flushed its files to the disk

If the process is killed at any point, RUN/checkpoint-N is either absent or complete. Files left in _saving are removed
when the run starts again. Before it is deleted, a checkpoint is renamed to _deleting-checkpoint-N.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_dist.errors import SaveError, UserError

MARKER, FORMAT_VERSION = "complete.json", 1
STAGING, DELETING = "_saving", "_deleting-"  # transformers skips these names when it uploads the run's folder
CHECKSUM_BYTES = 16 * 2**20  # files up to this size get a checksum; shards beyond are checked by size
LEAST_KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_KNOWN = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
_NO_RIGHT = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Manifest:
    """The content of complete.json.

    Attributes:
        files: path below the checkpoint -> size in bytes, and SHA-256 of small files (else None).
        fingerprint: of the run (run/fingerprint.py).
    """

    step: int
    world_size: int
    files: dict[str, tuple[int, str | None]]
    fingerprint: dict[str, Any]
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        """Write to a temporary name, flush and rename, so that the marker is never partial."""
        files = {name: {"size": size, **({"sha256": sha} if sha else {})} for name, (size, sha) in self.files.items()}
        text = json.dumps({**vars(self), "files": files}, indent=1)
        temporary = folder / f".{MARKER}"
        temporary.write_text(text + "\n", encoding="utf-8")
        flush(temporary)
        os.replace(temporary, folder / MARKER)
        flush(folder)


def step_of(folder: Path) -> int:
    """N of checkpoint-N."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def checkpoint_folders(run: Path) -> list[Path]:
    """Every checkpoint-N of a run, complete or not, oldest first."""
    if not run.is_dir():
        return []
    return sorted((path for path in run.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)), key=step_of)


def seal(folder: Path, step: int, world_size: int, fingerprint: dict[str, Any]) -> Manifest:
    """Write the marker into a folder after every rank has finished writing."""
    files = {str(path.relative_to(folder)): _facts(path) for path in _files(folder)}
    manifest = Manifest(step, world_size, files, fingerprint)
    manifest.save(folder)
    return manifest


def publish(staged: Path, run: Path) -> Path:
    """Rename a sealed folder into the run. It replaces an existing one, left from before the run was resumed from an
    older checkpoint."""
    target, old = run / staged.name, run / f"{DELETING}{staged.name}"
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(staged, target)
    flush(run)
    shutil.rmtree(old, ignore_errors=True)
    return target


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint.

    Raises:
        ValueError: why the folder is not a complete checkpoint of a known version.
    """
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = {name: (facts["size"], facts.get("sha256")) for name, facts in content["files"].items()}
        version = content["format_version"]
        manifest = Manifest(content["step"], content["world_size"], files, content["fingerprint"], version)
    except FileNotFoundError:
        raise ValueError(f"no {MARKER}: it was not finished, or not written by this program") from None
    except RecursionError:
        raise ValueError(f"{MARKER} cannot be read (nested too deeply)") from None
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{MARKER} cannot be read ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r}; this program reads {FORMAT_VERSION}")
    odd = _odd_part(manifest)
    if odd is not None:
        raise ValueError(f"{MARKER} cannot be read ({odd})")
    return manifest


def _odd_part(manifest: Manifest) -> str | None:
    """What this program does not write into a manifest. A file outside of the checkpoint is never looked at."""
    for name, number in (("step", manifest.step), ("world_size", manifest.world_size)):
        if type(number) is not int or number < 0:
            return f"{name} is {number!r}"
    if not isinstance(manifest.fingerprint, dict):
        return "fingerprint is not an object"
    for name, (size, checksum) in manifest.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            return f"a file outside of the checkpoint: {name!r}"
        if type(size) is not int or not isinstance(checksum, str | None):
            return f"size or checksum of {name!r}"
    return None


def verify(folder: Path) -> Manifest:
    """Read the manifest and compare the files with it. Raises ValueError with the first difference."""
    manifest = read_manifest(folder)
    for name, (size, checksum) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {size}")
        if checksum is not None and _sha256(path) != checksum:
            raise ValueError(f"{name} is not what was written (its checksum differs)")
    return manifest


def rotate(run: Path, limit: int | None, keep: Path | None) -> list[Path]:
    """Remove the oldest complete checkpoints beyond `limit`, which is at least two, but never `keep`."""
    if limit is None or limit <= 0:
        return []
    complete = [folder for folder in checkpoint_folders(run) if (folder / MARKER).is_file()]
    spare = [folder for folder in complete[:-LEAST_KEPT] if folder != keep]
    doomed = spare[: max(len(complete) - max(limit, LEAST_KEPT), 0)]
    for folder in doomed:
        remove(folder)
    return doomed


def remove(folder: Path) -> None:
    """Remove a checkpoint so that a partial one never appears under its name."""
    doomed = folder.with_name(DELETING + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(run: Path) -> list[Path]:
    """Remove checkpoints that a killed run left partly written or partly deleted; returns their folders."""
    if not run.is_dir():
        return []
    finish_publishing(run)
    unfinished = [*(run / STAGING).glob("*"), *run.glob(f"{DELETING}*")]
    shutil.rmtree(run / STAGING, ignore_errors=True)
    for folder in run.glob(f"{DELETING}*"):
        shutil.rmtree(folder, ignore_errors=True)
    return unfinished


def finish_publishing(run: Path) -> None:
    """Finish the two renames of `publish` that a kill has left half done, or undo the first. Without its second one the
    checkpoint of that step is under neither name."""
    for staged in (run / STAGING).glob("checkpoint-*"):
        _finish_publishing(staged, run)


def _finish_publishing(staged: Path, run: Path) -> None:
    target, old = run / staged.name, run / f"{DELETING}{staged.name}"
    if target.exists() or not old.is_dir():
        return
    for folder in (staged, old):
        try:
            verify(folder)
        except ValueError:
            continue
        os.rename(folder, target)
        flush(run)
        return


def flush_tree(folder: Path) -> None:
    """fsync every file and folder below: a rename must not reach the disk before the content does."""
    for path in _files(folder):
        flush(path)
    for parent, _, _ in os.walk(folder, topdown=False):
        flush(Path(parent))


def flush(path: Path) -> None:
    """fsync. Some file systems (FUSE, SMB) do not know it for folders; nothing better can be done there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_KNOWN:
            raise
    finally:
        os.close(descriptor)


def why_unwritable(error: BaseException, folder: Path) -> str | None:
    """The reason in words if `error` is a failed write, else None.

    torch and safetensors wrap the operating system's error in their own, sometimes without its text.
    """
    numbers = {cause.errno for cause in _causes(error) if isinstance(cause, OSError)}
    text = " ".join(str(cause) for cause in _causes(error))
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if numbers & _NO_ROOM or "os error 28" in text or "No space left" in text:
        return f"no space left on the device (free: {free / 2**20:.0f} MiB)"
    if numbers & _NO_RIGHT or "os error 30" in text or "os error 13" in text or "Permission denied" in text:
        return "the folder is read-only, or not this user's"
    if "PytorchStreamWriter" in text or "file write failed" in text or "unexpected pos" in text:
        return f"writing failed (free: {free / 2**20:.0f} MiB)"
    return f"{type(error).__name__}: {error}" if any(isinstance(cause, OSError) for cause in _causes(error)) else None


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Within it a failed write into a run's folder, after the last checkpoint, is one line.

    Raises:
        SaveError: `what` could not be written.
    """
    try:
        yield
    except Exception as error:
        reason = None if isinstance(error, UserError | SaveError) else why_unwritable(error, folder)
        if reason is None:
            raise
        raise SaveError(
            f"Cannot write {what} into {folder}: {reason}. Checkpoints are intact: after making room, start again with "
            "--resume_from_checkpoint auto."
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER)


def _facts(path: Path) -> tuple[int, str | None]:
    size = path.stat().st_size
    return size, _sha256(path) if size <= CHECKSUM_BYTES else None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()  # small files only
