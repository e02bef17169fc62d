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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_dist.errors import SaveError, UserError
from orpo_dist.run.checksums import checksums, share

MARKER, FORMAT_VERSION = "complete.json", 1
SET_ASIDE = "damaged.json"  # the marker of a checkpoint that was found damaged
STAGING, DELETING = "_saving", "_deleting-"  # transformers skips these names when it uploads the run's folder
LEAST_KEPT = 2
_OWN_DIGEST = "sha256"  # of the rest of the marker; earlier versions of this program left it out
_FINGERPRINT = ("model", "data", "options", "versions")  # its parts (run/fingerprint.py)
_NAME = re.compile(r"checkpoint-(\d+)")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_KNOWN = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
_NO_RIGHT = {errno.EROFS, errno.EACCES, errno.EPERM}


class Damaged(ValueError):
    """A complete checkpoint has a file that is not what was written. The text names it."""


@dataclass(frozen=True)
class Manifest:
    """The content of complete.json.

    Attributes:
        files: path below the checkpoint -> size in bytes, and SHA-256. Earlier versions of this program left it out
            (None) for files beyond 16 MiB.
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
        content = json.loads(json.dumps({**vars(self), "files": files}))  # as it will be read
        text = json.dumps({**content, _OWN_DIGEST: _digest(content)}, indent=1)
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


def sizes(folder: Path) -> dict[str, int]:
    """Path below a checkpoint -> size in bytes of its file, the marker left out."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}


def seal(
    folder: Path, step: int, world_size: int, fingerprint: dict[str, Any], known: Mapping[str, str] | None = None
) -> Manifest:
    """Write the marker into a folder after every rank has finished writing.

    known: checksums that the ranks have found already; those of other files are computed.
    """
    found, known = sizes(folder), known or {}
    digests = {**checksums(folder, [name for name in found if name not in known]), **known}
    manifest = Manifest(step, world_size, {name: (found[name], digests[name]) for name in found}, fingerprint)
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
        Damaged: the marker is not what was written.
        ValueError: why the folder is not a complete checkpoint of a known version.
    """
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no {MARKER}: it was not finished, or not written by this program") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: of JSON and of UTF-8
        raise ValueError(f"{MARKER} cannot be read ({error})") from error
    version = content.get("format_version", 0) if isinstance(content, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version}; this program reads {FORMAT_VERSION}")
    try:
        files = {str(name): (facts["size"], facts.get("sha256")) for name, facts in content["files"].items()}
        manifest = Manifest(content["step"], content["world_size"], files, content["fingerprint"])
        strange = _strange(manifest)
    except (AttributeError, KeyError, TypeError) as error:
        strange = f"{type(error).__name__}: {error}"
    if strange is not None:
        raise ValueError(f"{MARKER} cannot be read ({strange})")
    own = content.pop(_OWN_DIGEST, None)
    if own is not None and own != _digest(content):
        raise Damaged(f"{MARKER} is not what was written (its checksum differs)")
    return manifest


def _digest(content: dict[str, Any]) -> str:
    """Of a marker's content, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _strange(manifest: Manifest) -> str | None:
    """What no program has written, if there is something: a damaged marker may still be JSON."""
    numbers = (
        manifest.step,
        manifest.world_size,
        manifest.format_version,
        *(size for size, _ in manifest.files.values()),
    )
    if any(type(number) is not int or number < 0 for number in numbers):
        return "a step, number of ranks, version or size that is not a number"
    outside = [name for name in manifest.files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        return f"the file {outside[0]!r} is not below the checkpoint"
    parts = manifest.fingerprint
    if not isinstance(parts, dict) or not all(isinstance(parts.get(name, {}), dict) for name in _FINGERPRINT):
        return "a fingerprint that is not a mapping"
    return None


def verify(folder: Path, part: int = 0, parts: int = 1) -> Manifest:
    """Read the manifest and compare the files with it: the size of each, and the content of the share `part` of `parts`
    (run/verified.py: each rank reads one).

    Raises:
        Damaged: the first file that differs.
        ValueError: not a complete checkpoint, or a file that cannot be read.
    """
    manifest = read_manifest(folder)
    try:
        for name, (size, _) in manifest.files.items():
            path = folder / name
            if not path.is_file():
                raise Damaged(f"{name} is missing")
            if path.stat().st_size != size:
                raise Damaged(f"{name} has {path.stat().st_size} bytes instead of {size}")
        expected = {name: (size, sha) for name, (size, sha) in manifest.files.items() if sha is not None}
        mine = share({name: size for name, (size, _) in expected.items()}, part, parts)
        found = checksums(folder, mine)
    except OSError as error:
        raise ValueError(f"{error.filename or folder} cannot be read ({error.strerror or error})") from error
    for name in sorted(found):
        if found[name] != expected[name][1]:
            raise Damaged(f"{name} is not what was written (its checksum differs)")
    return manifest


def unchecked(manifest: Manifest) -> str | None:
    """In words, the files of a checkpoint whose content cannot be checked; None if there are none."""
    names = [name for name, (_, sha) in manifest.files.items() if sha is None]
    if not names:
        return None
    total = sum(manifest.files[name][0] for name in names) / 2**30
    return f"{names[0]}{f' and {len(names) - 1} more files' if len(names) > 1 else ''} ({total:.2f} GiB)"


def set_aside(folder: Path) -> None:
    """Make a damaged checkpoint count as incomplete for everyone: for the rotation, which keeps two complete ones, and
    for SLURM's jobs, which look for the newest. Its files stay."""
    os.replace(folder / MARKER, folder / SET_ASIDE)
    flush(folder)


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
