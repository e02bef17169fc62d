"""Restarts of a group of training processes, on the same nodes, after one of them has died.

torchrun's own restarts do not look at exit codes: they would repeat bad input and runs that were asked to stop, and a
failure that comes back at the same step.
"""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from orpo_dist.cluster.orphans import adopting_orphans, end_children
from orpo_dist.cluster.peers import Peers, Verdict
from orpo_dist.cluster.processes import STOP_SIGNALS, GroupEnd, telling_code
from orpo_dist.cluster.status import newest_checkpoint
from orpo_dist.errors import BAD_INPUT, FAILED, FINISHED, GAVE_UP, INTERRUPTED, STOPPED, RunStopped
from orpo_dist.run.checkpoint import finish_publishing
from orpo_dist.run.step_file import VARIABLE, last_step

_FINAL = (FINISHED, BAD_INPUT, GAVE_UP, STOPPED, INTERRUPTED)
_BY_NAME = ("", "auto", "true", "false", "no", "none")


@dataclass
class Restarts:
    """Decides, on the head node, whether a run starts again.

    Attributes:
        limit: how often it may.
        run: the run's folder.
        asked: `resume_from_checkpoint` of the recipe and its flags.
        steps: the folder of the step files.
    """

    limit: int
    run: Path
    asked: str
    steps: Path
    done: int = 0
    _failed_at: tuple[str | None, ...] = ()
    _known: dict[Path, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = self._markers()

    def decide(self, ends: Sequence[GroupEnd], gone: Sequence[str] = ()) -> Verdict:
        """ends: of the nodes, the first to fail first. gone: nodes whose launcher has ended without a word."""
        codes = [end.code for end in ends]
        code = telling_code(codes) if any(codes) else FINISHED
        if code in _FINAL and not gone:
            return Verdict(code)
        cause = next((end.cause for end in ends if end.cause), "the run failed")
        asked = next((end.asked for end in ends if end.asked), None)
        finish_publishing(self.run)
        newest = newest_checkpoint(self.run)
        why_not = (
            f"the launcher of {gone[0]} is gone" if gone
            else f"it was asked to stop ({asked})" if asked
            else f"failed twice with no new checkpoint in between (newest: {newest or 'none'})"
            if self._failed_at == (newest,)
            else f"already restarted {self.done} of {self.limit} times (--max-restarts)" if self.done >= self.limit
            else None
        )  # fmt: skip
        step = last_step(self.steps)
        where = f" at step {step}" if step is not None else ""
        if why_not is not None:
            return Verdict(FAILED if code in (FINISHED, STOPPED) else code, f"{cause}{where}; not restarted: {why_not}")
        self.done += 1
        self._failed_at = (newest,)
        resume = self._resume(newest)
        begin = f"resuming from {Path(newest).name}" if resume and newest else "starting as before"
        begin = begin if newest else "no checkpoint yet, starting from the beginning"
        return Verdict(code, f"restart {self.done} of {self.limit}: {cause}{where}; {begin}", self.done, tuple(resume))

    def _resume(self, newest: str | None) -> list[str]:
        """Flags for the next start. A run that was started from a path goes on from what it has saved since."""
        if newest is None:
            return []
        if self.asked.lower() in _BY_NAME:
            return ["--resume_from_checkpoint", "auto"]
        saved = [marker for marker, time in self._markers().items() if self._known.get(marker) != time]
        if not saved:
            return []
        newest_saved = max(saved, key=lambda marker: int(marker.parent.name.removeprefix("checkpoint-")))
        return ["--resume_from_checkpoint", str(newest_saved.parent)]

    def _markers(self) -> dict[Path, int]:
        markers = self.run.glob("checkpoint-*/complete.json")
        return {m: m.stat().st_mtime_ns for m in markers if m.parent.name.removeprefix("checkpoint-").isdigit()}


def run_with_restarts(
    start: Callable[[Sequence[str], int], GroupEnd], limit: int, run: Path, asked: str, peers: Peers
) -> int:
    """Run `start(further flags, restart)` until the run has ended or may not start again. Returns its exit code.

    peers: the other nodes of the run.
    """
    others = {child.pid for child in psutil.Process().children()}
    stopped: list[str] = []
    with tempfile.TemporaryDirectory(prefix="orpo-dist-steps-") as folder, adopting_orphans(), _noting(stopped):
        restarts = Restarts(limit, run, asked, Path(folder))
        os.environ[VARIABLE] = folder
        verdict = Verdict(FINISHED)
        try:
            while True:
                with peers.watching(others), _ending(stopped, run):
                    end = start(verdict.resume, verdict.restart)
                end_children(others)
                if stopped and end.asked is None:
                    end = GroupEnd(end.code, end.cause, stopped[0])
                verdict = peers.agree(end, restarts.decide)
                if verdict.said:
                    print(f"orpo-dist: {verdict.said}", file=sys.stderr, flush=True)
                if not verdict.restart or stopped:
                    return verdict.code
        finally:
            del os.environ[VARIABLE]


@contextmanager
def _ending(stopped: list[str], run: Path) -> Iterator[None]:
    """Within it a signal that comes before there are processes to forward it to ends this one, with the newest
    checkpoint. Outside, `stopped` waits for the other nodes to agree."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: object) -> None:
        raise RunStopped(signal.Signals(number).name)

    try:
        with _handled_by(end):
            yield
    except RunStopped as stop:
        stopped.append(stop.reason)
        newest = newest_checkpoint(run)
        step = int(newest.removeprefix("checkpoint-")) if newest else 0
        raise RunStopped(stop.reason, step, str(run / newest) if newest else None) from None


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _noting(stopped: list[str]) -> Iterator[None]:
    """Within it a signal to stop, between two groups of processes, ends the restarts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _frame: object) -> None:
        stopped.append(signal.Signals(number).name)

    with _handled_by(note):
        yield
