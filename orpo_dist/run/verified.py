"""Whether the content of a checkpoint is what was written: each rank reads a share of the files, and they all agree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from orpo_dist.distributed.ranks import on_first_rank
from orpo_dist.errors import UserError
from orpo_dist.run import checkpoint as checkpoints


class VerifiedCheckpoint(str):
    """The path of a checkpoint that the ranks have just verified. The trainer need not read it once more."""


def why_unusable(folder: Path) -> ValueError | None:
    """The first difference between a checkpoint and its manifest that any rank has found. A collective: every rank must
    call it, and all get the same answer."""
    state = PartialState()
    whole = on_first_rank(lambda: _failure(lambda: checkpoints.read_manifest(folder)))
    if whole is not None:
        return whole
    mine = _failure(lambda: checkpoints.verify(folder, state.process_index, state.num_processes))
    found = [mine] if state.num_processes == 1 else gather_object([mine])
    return next((failure for failure in found if failure is not None), None)


def check_if_checkpoint(folder: str | None) -> None:
    """Verify a folder that weights are loaded from, if it is a checkpoint. A collective: every rank must call it.

    Raises:
        UserError: it is damaged.
    """
    if folder is None or not on_first_rank(lambda: (Path(folder) / checkpoints.MARKER).is_file()):
        return
    reason = why_unusable(Path(folder))
    if reason is not None:
        raise UserError(f"{folder} is a checkpoint that is damaged: {reason}. Use another one.")


def _failure(check: Callable[[], Any]) -> ValueError | None:
    try:
        check()
    except ValueError as error:
        return error
    return None
