"""Which checkpoint a run continues from, and whether it is the same run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo_dist.distributed.log import get_logger
from orpo_dist.distributed.zero import LATEST_UNIVERSAL
from orpo_dist.errors import UserError
from orpo_dist.run.checkpoint import Manifest, checkpoint_folders, verify
from orpo_dist.run.fingerprint import differences

logger = get_logger(__name__)
_NO, _NEWEST = ("false", "no", "none"), ("auto", "true")


def checkpoint_to_resume(asked: str | bool | None, folder: Path, say: Callable[[str], Any] = print) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means.

    `auto`: the newest complete one in the run's folder, or a fresh start; `true`: the newest complete one, which must
    exist; else a path. What is skipped on the way is said.

    Raises:
        UserError: no such checkpoint, one that is not complete, or a fresh start in a folder that holds the
            checkpoints of another run.
    """
    word = str(asked or "false").lower()
    found = checkpoint_folders(folder)
    if word in _NO:
        if found:
            raise UserError(
                f"{folder} holds {found[-1].name} of an earlier run. To continue that run: "
                "--resume_from_checkpoint auto. To start anew: another --output_dir, or remove the folder."
            )
        return None
    if word not in _NEWEST:
        try:
            verify(Path(str(asked)))
        except ValueError as reason:
            raise UserError(
                f"resume_from_checkpoint={asked} is no checkpoint to resume from: {reason}. To start from its weights "
                "alone: --model_name_or_path, or --adapter_name_or_path for an adapter."
            ) from reason
        return str(asked)
    reasons = []
    for candidate in reversed(found):
        try:
            verify(candidate)
        except ValueError as reason:
            reasons.append(f"{candidate.name}: {reason}")
            continue
        for line in reasons:
            say(f"Skipping {line}")
        return str(candidate)
    if reasons:
        raise UserError(
            f"None of the checkpoints in {folder} is complete ({'; '.join(reasons)}). To start anew: another "
            "--output_dir, or remove them."
        )
    if word == "true":
        raise UserError(
            f"resume_from_checkpoint=true, but {folder} holds no checkpoint. `auto` starts a fresh run then."
        )
    return None


def check_same_run(manifest: Manifest, now: dict[str, Any], *, allow_changed: bool, strict_versions: bool) -> None:
    """Compare a checkpoint's fingerprint with that of the run that wants to continue it.

    Raises:
        UserError: another model, data, loss, batch or optimizer, with the differences; another library version with
            `strict_versions`.
    """
    changed = [line for part in ("model", "data", "options") for line in differences(manifest.fingerprint, now, part)]
    if changed and not allow_changed:
        raise UserError(
            f"The checkpoint of step {manifest.step} belongs to another run. What differs (checkpoint -> now):\n  "
            + "\n  ".join(changed)
            + "\nSet them back, or continue with --allow_changed and accept that it is not the same run."
        )
    if changed:
        logger.warning("Continuing with what has changed since the checkpoint: %s", "; ".join(changed))
    versions = differences(manifest.fingerprint, now, "versions")
    if versions and strict_versions:
        raise UserError(
            f"Versions differ from those of the checkpoint of step {manifest.step}: {'; '.join(versions)}. Install "
            "them, or leave out --strict_versions."
        )
    if versions:
        logger.warning("Versions differ from the checkpoint's, so results may too: %s", "; ".join(versions))


def check_topology(manifest: Manifest, topology: str, world_size: int, checkpoint: str) -> None:
    """Whether a checkpoint can be loaded by this kind of run on this number of ranks.

    Raises:
        UserError: it was written by another kind of run, or holds ZeRO partitions of another number of ranks.
    """
    saved = manifest.fingerprint.get("topology")
    if saved != topology:
        raise UserError(
            f"{checkpoint} was written by a {saved} run and this is a {topology} one: their files differ. Use the "
            "same accelerate config as before."
        )
    if manifest.world_size != world_size and topology.startswith("zero") and LATEST_UNIVERSAL not in manifest.files:
        raise UserError(
            f"{checkpoint} holds DeepSpeed partitions of {manifest.world_size} ranks, and this run has {world_size}. "
            f"Convert it once, then start again: orpo-dist convert-checkpoint {checkpoint}"
        )
