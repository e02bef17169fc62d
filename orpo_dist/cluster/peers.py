"""The launchers of a run's nodes, connected while it trains: all of them end and start their processes together.

The head decides. The lines are those of the meeting (rendezvous.py):

    other node -> head   {"code": 137, "cause": "rank 3 was ...", "asked": null}       its processes have ended
    head -> other node   {"end": true}                         a node has failed: end your processes, and report
    head -> other node   {"code": 137, "said": "restart 1 of 3: ...", "restart": 1, "resume": [...]}   the verdict
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil

from orpo_dist.cluster.line import Line
from orpo_dist.cluster.processes import GroupEnd
from orpo_dist.errors import FAILED, FINISHED, STOPPED

# The processes of a node that has not failed itself lose their peers and say so, or find the same fault. On the same
# node torchrun does not wait; between nodes NCCL may take minutes to notice.
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Verdict:
    """What follows after the processes of all nodes have ended.

    Attributes:
        code: the exit code of the run, if it does not start again.
        restart: number of the restart that follows; 0 for none.
        resume: further flags of that start.
    """

    code: int
    said: str = ""
    restart: int = 0
    resume: tuple[str, ...] = ()


Decide = Callable[[Sequence[GroupEnd], Sequence[str]], Verdict]


class Peers:
    """The other nodes, seen from this one.

    Args:
        lines: by node rank: the head's to the others, or the one to the head (0); empty for a run of one node.
    """

    def __init__(self, lines: Mapping[int, Line]):
        self._lines = dict(lines)
        self._is_head = 0 not in self._lines
        self._reports: dict[int, GroupEnd] = {}
        self._gone: list[int] = []
        self._own_ended = threading.Event()
        self._head_is_gone = self._ended_by_us = False

    @contextmanager
    def watching(self, others: Collection[int]) -> Iterator[None]:
        """While the processes of this node run: end them when those of another node have failed. others: ids of
        children of this process that are none of them."""
        self._reports, self._own_ended, self._ended_by_us = {}, threading.Event(), False
        watch = threading.Thread(target=self._watch, args=(others,), name="peers", daemon=True)
        watch.start()
        try:
            yield
        finally:
            self._own_ended.set()
            watch.join()

    def agree(self, end: GroupEnd, decide: Decide) -> Verdict:
        """Wait for the processes of all nodes; the head's `decide` applies to all of them."""
        if self._ended_by_us:  # not its own end: that of another node counts
            end = replace(end, cause="")
        if not self._is_head:
            return self._verdict_of_head(end)
        told = _failed(end)
        if told:
            self._tell_end()
        while len(self._reports) + len(self._gone) < len(self._lines):
            self._hear(POLL_SECONDS)
            if not told and self._a_node_failed():
                told = True
                self._tell_end()
        # A rank that was killed makes those of other nodes fail, which may be seen before.
        ends = sorted([end, *self._reports.values()], key=lambda end: (not end.cause, "killed" not in end.cause))
        verdict = decide(ends, [f"node rank {rank}" for rank in self._gone])
        for rank, line in self._lines.items():
            if rank not in self._gone:
                with suppress(OSError):
                    line.send(asdict(verdict))
        return verdict

    def close(self) -> None:
        for line in self._lines.values():
            line.close()

    def _watch(self, others: Collection[int]) -> None:
        if not self._lines:
            return
        while not self._own_ended.is_set() and not self._is_over():
            pass  # both wait
        if self._own_ended.is_set():
            return
        if self._is_head:
            self._tell_end()
        self._own_ended.wait(GRACE_SECONDS)
        while not self._own_ended.is_set():  # again and again: the processes may be just starting
            self._ended_by_us = True
            _kill_children(others)
            self._own_ended.wait(POLL_SECONDS)

    def _is_over(self) -> bool:
        """Whether another node has failed."""
        if not self._is_head:
            return self._told_to_end()
        self._hear(POLL_SECONDS)
        self._own_ended.wait(POLL_SECONDS / 10)  # all others may have reported
        return self._a_node_failed()

    def _a_node_failed(self) -> bool:
        return bool(self._gone) or any(_failed(end) for end in self._reports.values())

    def _hear(self, seconds: float) -> None:
        """Take what the other nodes have sent, on the head."""
        waiting = {rank: line for rank, line in self._lines.items() if rank not in (*self._reports, *self._gone)}
        for rank, line in waiting.items():
            try:
                if line.has_more(seconds / len(waiting)):
                    self._reports[rank] = GroupEnd(**line.receive())
            except (OSError, ValueError, TypeError):
                self._gone.append(rank)

    def _tell_end(self) -> None:
        for rank, line in self._lines.items():
            if rank not in (*self._reports, *self._gone):
                with suppress(OSError):
                    line.send({"end": True})

    def _told_to_end(self) -> bool:
        line = self._lines[0]
        if self._head_is_gone:
            return True
        try:
            return line.has_more(POLL_SECONDS) and bool(line.receive().get("end"))
        except (OSError, ValueError):
            self._head_is_gone = True
            return True

    def _verdict_of_head(self, end: GroupEnd) -> Verdict:
        line = self._lines[0]
        try:
            line.send(asdict(end))
            while True:
                answer: dict[str, Any] = line.receive(None)
                if "code" in answer:
                    return Verdict(**answer | {"resume": tuple(answer["resume"])})
        except (OSError, ValueError, TypeError, KeyError):
            if not _failed(end):
                return Verdict(end.code)
            said = f"{end.cause or 'the run failed'}; not restarted: the launcher of node rank 0 is gone"
            return Verdict(end.code or FAILED, said)


def _failed(end: GroupEnd) -> bool:
    return end.code not in (FINISHED, STOPPED)


def _kill_children(others: Collection[int]) -> None:
    for child in psutil.Process().children(recursive=True):
        if child.pid not in others:
            with suppress(psutil.NoSuchProcess):
                child.kill()
