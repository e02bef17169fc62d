"""Which checkpoint a run continues from."""

from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from orpo_dist.errors import UserError


def checkpoint_to_resume(asked: str | None, folder: Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means.

    `auto`: the newest in the run's folder, or a fresh start; `true`: the newest, which must exist; else a path.

    Raises:
        UserError: no such checkpoint, or a fresh start in a folder that holds the checkpoints of another run.
    """
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    word = (asked or "false").lower()
    if word in ("false", "no", "none"):
        if newest is not None:
            raise UserError(
                f"{folder} holds {Path(newest).name} of an earlier run. To continue that run: "
                "--resume_from_checkpoint auto. To start anew: another --output_dir, or remove the folder."
            )
        return None
    if word == "auto":
        return newest
    if word == "true":
        if newest is None:
            raise UserError(
                f"resume_from_checkpoint=true, but {folder} holds no checkpoint. `auto` starts a fresh run then."
            )
        return newest
    if not (Path(str(asked)) / "trainer_state.json").is_file():
        raise UserError(f"resume_from_checkpoint={asked} is no checkpoint: it holds no trainer_state.json.")
    return asked
