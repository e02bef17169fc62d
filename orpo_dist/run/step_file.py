"""The step that a rank is at, for the launcher that tells how the rank died: a small file in a local folder."""

import os
from pathlib import Path

from orpo_dist.distributed.environment import launched_rank

VARIABLE = "ORPO_DIST_STEPS"  # the folder, set by a launcher that asks for it


class StepFile:
    """The file of this rank. Writing takes a few microseconds: it is not flushed, and survives the process."""

    def __init__(self, folder: Path):
        launched = launched_rank()
        path = folder / f"step.{launched.rank if launched else 0}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)

    def write(self, step: int) -> None:
        os.pwrite(self._file, b"%20d" % step, 0)

    @classmethod
    def asked_for(cls) -> "StepFile | None":
        folder = os.environ.get(VARIABLE, "")
        return cls(Path(folder)) if folder and Path(folder).is_dir() else None


def last_step(folder: Path) -> int | None:
    """The last step that a rank of this node has ended, or None."""
    texts = [path.read_text("utf-8") for path in folder.glob("step.*")]
    return max((int(text) for text in texts if text.strip().isdigit()), default=None)
