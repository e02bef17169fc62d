"""The checkpoint that a run continues from, and whether it belongs to the same run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from orpo_dist.distributed.log import get_logger
from orpo_dist.distributed.ranks import on_first_rank
from orpo_dist.distributed.zero import LATEST_UNIVERSAL
from orpo_dist.errors import UserError
from orpo_dist.run.checkpoint import (
    SET_ASIDE,
    Damaged,
    Manifest,
    checkpoint_folders,
    finish_publishing,
    read_manifest,
    set_aside,
    unchecked,
)
from orpo_dist.run.fingerprint import differences
from orpo_dist.run.verified import VerifiedCheckpoint, why_unusable

logger = get_logger(__name__)
_NO, _NEWEST = ("false", "no", "none"), ("auto", "true")


def checkpoint_to_resume(
    asked: str | bool | None, folder: Path, say: Callable[[str], Any] = print
) -> VerifiedCheckpoint | None:
    """The checkpoint that `resume_from_checkpoint` selects. A collective: every rank must call it, and reads a share of
    the files.

    `auto`: the newest complete one in the run's folder, or a fresh start; `true`: the newest complete one, which must
    exist; else a path. `say` reports, on rank 0, each checkpoint that is skipped. A damaged one that is skipped counts
    as incomplete from then on. One whose publication a kill has interrupted is put under its name first.

    Raises:
        UserError: no such checkpoint, one that is not complete or damaged, or a fresh start in a folder that holds the
            checkpoints of another run.
    """
    on_first_rank(lambda: finish_publishing(folder))
    word = str(asked or "false").lower()
    if word in _NO:
        newest = on_first_rank(lambda: [path.name for path in checkpoint_folders(folder)][-1:])
        if newest:
            raise UserError(
                f"{folder} holds {newest[0]} of an earlier run. To continue that run: "
                "--resume_from_checkpoint auto. To start from scratch, use another --output_dir or remove the folder."
            )
        return None
    if word in _NEWEST:
        return _newest(folder, say, must_exist=word == "true")
    if isinstance(asked, VerifiedCheckpoint):
        return asked
    path = Path(str(asked))
    reason = why_unusable(path)
    if reason is not None:
        raise UserError(
            f"resume_from_checkpoint={asked} is not a usable checkpoint: {reason}. To start from its weights "
            "alone, pass it as --model_name_or_path, or as --adapter_name_or_path for an adapter."
        ) from reason
    return _usable(path, say)


def _newest(folder: Path, say: Callable[[str], Any], must_exist: bool) -> VerifiedCheckpoint | None:
    reasons: dict[Path, ValueError] = {}
    for candidate in reversed(on_first_rank(lambda: checkpoint_folders(folder))):
        reason = why_unusable(candidate)
        if reason is None:
            on_first_rank(lambda: _set_aside(reasons, say))
            return _usable(candidate, say)
        reasons[candidate] = reason
    if reasons:
        told = "; ".join(f"{path.name}: {reason}" for path, reason in reasons.items())
        raise UserError(
            f"None of the checkpoints in {folder} is complete ({told}). To start from scratch, use "
            "another --output_dir or remove them."
        )
    if must_exist:
        raise UserError(
            f"resume_from_checkpoint=true, but {folder} holds no checkpoint. Use `auto` to start from scratch."
        )
    return None


def _set_aside(reasons: dict[Path, ValueError], say: Callable[[str], Any]) -> None:
    for path, reason in reasons.items():
        if isinstance(reason, Damaged):
            set_aside(path)
            say(f"Skipping {path.name}: {reason}. It no longer counts as complete ({SET_ASIDE} says what it had).")
        else:
            say(f"Skipping {path.name}: {reason}")


def _usable(path: Path, say: Callable[[str], Any]) -> VerifiedCheckpoint:
    if PartialState().is_main_process:
        without = unchecked(read_manifest(path))
        if without is not None:
            say(f"{path.name} is of an earlier version of this program, without a checksum of {without}.")
    return VerifiedCheckpoint(path)


def check_same_run(manifest: Manifest, now: dict[str, Any], *, allow_changed: bool, strict_versions: bool) -> None:
    """Compare a checkpoint's fingerprint with that of the current run, `now`.

    Raises:
        UserError: the model, data, loss, batch or optimizer differ (the message lists how); with `strict_versions` also
            if a library version differs.
    """
    changed = [line for part in ("model", "data", "options") for line in differences(manifest.fingerprint, now, part)]
    if changed and not allow_changed:
        raise UserError(
            f"The checkpoint of step {manifest.step} belongs to another run. Differences (checkpoint -> now):\n  "
            + "\n  ".join(changed)
            + "\nRestore the old values, or continue with --allow_changed as a different run."
        )
    if changed:
        logger.warning("Continuing despite changes since the checkpoint: %s", "; ".join(changed))
    versions = differences(manifest.fingerprint, now, "versions")
    if versions and strict_versions:
        raise UserError(
            f"Versions differ from those of the checkpoint of step {manifest.step}: {'; '.join(versions)}. Install "
            "those, or omit --strict_versions."
        )
    if versions:
        logger.warning("Versions differ from the checkpoint's, so results may too: %s", "; ".join(versions))


def check_topology(manifest: Manifest, topology: str, world_size: int, checkpoint: str) -> None:
    """Check that a checkpoint can be loaded with this sharding on this number of ranks.

    Raises:
        UserError: it was written with another sharding, or holds ZeRO partitions of another number of ranks.
    """
    saved = manifest.fingerprint.get("topology")
    if saved != topology:
        raise UserError(
            f"{checkpoint} was written by a {saved} run, but this is a {topology} run and needs other files. Use the "
            "accelerate config of the earlier run."
        )
    if manifest.world_size != world_size and topology.startswith("zero") and LATEST_UNIVERSAL not in manifest.files:
        raise UserError(
            f"{checkpoint} holds DeepSpeed partitions of {manifest.world_size} ranks, and this run has {world_size}. "
            f"Convert it once, then start again: orpo-dist convert-checkpoint {checkpoint}"
        )
