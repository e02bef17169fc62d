"""The checkpoint that a run continues from, and whether it belongs to the same run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo_dist.distributed.log import get_logger
from orpo_dist.distributed.zero import LATEST_UNIVERSAL
from orpo_dist.errors import UserError
from orpo_dist.run.checkpoint import Manifest, checkpoint_folders, finish_publishing, verify
from orpo_dist.run.fingerprint import differences

logger = get_logger(__name__)
_NO, _NEWEST = ("false", "no", "none"), ("auto", "true")


def checkpoint_to_resume(asked: str | bool | None, folder: Path, say: Callable[[str], Any] = print) -> str | None:
    """The checkpoint that `resume_from_checkpoint` selects.

    `auto`: the newest complete one in the run's folder, or a fresh start; `true`: the newest complete one, which must
    exist; else a path. `say` reports each checkpoint that is skipped. One whose publication a kill has interrupted is
    put under its name first.

    Raises:
        UserError: no such checkpoint, one that is not complete, or a fresh start in a folder that holds the
            checkpoints of another run.
    """
    finish_publishing(folder)
    word = str(asked or "false").lower()
    found = checkpoint_folders(folder)
    if word in _NO:
        if found:
            raise UserError(
                f"{folder} holds {found[-1].name} of an earlier run. To continue that run: "
                "--resume_from_checkpoint auto. To start from scratch, use another --output_dir or remove the folder."
            )
        return None
    if word not in _NEWEST:
        try:
            verify(Path(str(asked)))
        except ValueError as reason:
            raise UserError(
                f"resume_from_checkpoint={asked} is not a usable checkpoint: {reason}. To start from its weights "
                "alone, pass it as --model_name_or_path, or as --adapter_name_or_path for an adapter."
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
            f"None of the checkpoints in {folder} is complete ({'; '.join(reasons)}). To start from scratch, use "
            "another --output_dir or remove them."
        )
    if word == "true":
        raise UserError(
            f"resume_from_checkpoint=true, but {folder} holds no checkpoint. Use `auto` to start from scratch."
        )
    return None


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
