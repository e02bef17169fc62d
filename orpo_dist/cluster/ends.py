"""How training processes ended, reported to the process that started them.

An exit code is not enough: running out of memory has no code, and 75 does not name the saved checkpoint. The starter
sets a folder in an environment variable, and each process that fails writes one file there.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from orpo_dist.errors import RunStopped

VARIABLE = "ORPO_DIST_ENDS"


@dataclass(frozen=True)
class End:
    """How one process ended.

    Attributes:
        out_of_memory: whether it ran out of memory, anywhere in the chain of its error.
        reason, step, checkpoint: of RunStopped; reason is None for any other end.
    """

    out_of_memory: bool = False
    reason: str | None = None
    step: int = 0
    checkpoint: str | None = None


@contextmanager
def recorded_end() -> Iterator[None]:
    """Write the error that leaves the block to the starter's folder, if there is one."""
    try:
        yield
    except BaseException as error:
        if VARIABLE in os.environ:
            path = Path(os.environ[VARIABLE], f"{os.getpid()}.json")
            with suppress(OSError):  # a full disk must not hide the error itself
                path.with_suffix(".part").write_text(json.dumps(asdict(_end_of(error))), encoding="utf-8")
                path.with_suffix(".part").replace(path)  # a signal may end this process during the write
        raise


def read_ends(folder: Path) -> list[End]:
    """The recorded ends, in no particular order. A killed process records nothing."""
    return [End(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]


def _end_of(error: BaseException) -> End:
    if isinstance(error, RunStopped):
        return End(reason=error.reason, step=error.step, checkpoint=error.checkpoint)
    from orpo_dist.model.upstream import is_out_of_memory

    link: BaseException | None = error
    seen: list[BaseException] = []
    while link is not None and link not in seen:
        if is_out_of_memory(link):
            return End(out_of_memory=True)
        seen.append(link)
        link = link.__cause__ or link.__context__
    return End()
