"""Hang limits: each phase of a run has its own, and the rank that has waited too long says who is silent, and ends.

A rank that is stopped, swapped out or stuck in a driver cannot speak for itself. So a thread of every rank gives signs
of life on the key-value store of the process group, and a rank whose phase has passed its limit reads those of the
others. Collectives have a timeout too (GRACE_SECONDS later), but its message names neither phase nor rank.
"""

import atexit
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from torch import distributed

from orpo_dist.distributed.timeouts import START_SECONDS, collectives_may_take

Phase = Literal["start", "step", "save", "evaluation", "last act"]
BEAT_SECONDS = 2.0
STORE_SECONDS = 10.0  # for one answer of the store
STOPPED_SECONDS = 20.0  # a sleep of BEAT_SECONDS that took so long
GRACE_SECONDS = 120.0  # until the collective itself fails, in case this thread cannot act


@dataclass(frozen=True)
class HangLimits:
    """Seconds without progress, per phase, and the option that sets each.

    A step is one optimizer step, an evaluation is counted from batch to batch, a save and a last act as a whole.
    """

    step: float
    save: float
    evaluation: float
    last_act: float

    def of(self, phase: Phase) -> tuple[float, str]:
        if phase == "start":
            return max(self.step, START_SECONDS), "the limit before the end of the first step"
        seconds, option = {
            "step": (self.step, "ddp_timeout"),
            "save": (self.save, "save_timeout"),
            "evaluation": (self.evaluation, "eval_timeout"),
            "last act": (self.last_act, "last_act_timeout"),
        }[phase]
        return seconds, option


@dataclass
class _Place:
    phase: Phase
    what: str
    deadline: float


class HangWatch:
    """Knows where this rank is, and ends it when that takes longer than its limit. Does nothing for one process."""

    def __init__(self, limits: HangLimits):
        self._limits = limits
        self._place: _Place | None = None
        self._store: Any = None
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """Starts its threads, once the process group exists; later calls change nothing."""
        if self._store is not None or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return
        # A connection of its own: the main thread may be waiting on the other. torch has no public name for the store.
        default: Any = distributed.distributed_c10d._get_default_store()
        self._store = default.clone()
        self._store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._rank, self._ranks = distributed.get_rank(), distributed.get_world_size()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Ends the threads, at the latest when the interpreter ends: one that comes back from the store after that is
        unwound by force, and the process aborts ("terminate called without an active exception")."""
        self._over.set()
        for thread in self._threads:
            thread.join(STORE_SECONDS)

    def follow(self, limits: HangLimits) -> None:
        self._limits = limits

    def now(self, phase: Phase, what: str) -> None:
        """This rank begins `what`, which belongs to `phase`: "step 5", "the save of step 4"."""
        seconds, _ = self._limits.of(phase)
        changed = self._place is None or self._place.phase != phase
        self._place = _Place(phase, what, time.monotonic() + seconds)
        if changed:
            collectives_may_take(seconds + GRACE_SECONDS)

    def progress(self) -> None:
        """The phase goes on: its time begins anew."""
        if (place := self._place) is not None:
            place.deadline = time.monotonic() + self._limits.of(place.phase)[0]

    @contextmanager
    def phase(self, phase: Phase, what: str) -> Iterator[None]:
        """Within this block the rank is in `phase`; afterwards the phase around it begins anew. Until the first step
        has ended, everything may take as long as that: the first forward may be that of an evaluation."""
        around = self._place
        self.now("start" if around is not None and around.phase == "start" else phase, what)
        try:
            yield
        finally:
            if around is None:
                self.leave()
            else:
                self.now(around.phase, around.what)

    def leave(self) -> None:
        """No limit holds until the next phase, except that of collectives."""
        self._place = None
        collectives_may_take(self._limits.step + GRACE_SECONDS)

    # ------------------------------------------------------------------ the threads

    def _beat(self) -> None:
        for beats in itertools.count():
            # An error: rank 0, which may hold the store, is gone.
            with suppress(RuntimeError):
                self._store.set(self._key(self._rank), f"{beats}|{socket.gethostname()}|{self._whereabouts()}")
            if self._over.wait(BEAT_SECONDS):
                return

    def _watch(self) -> None:
        woke = time.monotonic()
        while not self._over.wait(BEAT_SECONDS):
            slept, woke = time.monotonic() - woke, time.monotonic()
            place = self._place
            if place is None:
                continue
            if slept > STOPPED_SECONDS:  # so was this process (SIGSTOP, scontrol suspend)
                place.deadline += slept
            elif woke > place.deadline:
                self._end(place)

    def _end(self, place: _Place) -> None:
        found = self._others()
        if self._place is not place or time.monotonic() <= place.deadline:
            return  # it went on meanwhile
        seconds, option = self._limits.of(place.phase)
        line = (
            f"orpo-dist: rank {self._rank} of {self._ranks} on {socket.gethostname()} has waited longer than "
            f"{seconds:g} s in {place.what} ({option}). {found}"
        )
        os.write(2, f"{line}\n".encode())
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's last lines show it
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(TimeoutError(line))
        os._exit(1)  # the main thread waits in a collective, and no exception reaches it there

    def _others(self) -> str:
        """What the others show: who gives no sign of life, else where each of them is."""
        signs: list[dict[int, str | None]] = []

        def look_twice() -> None:
            with suppress(RuntimeError):
                signs.append(self._signs())
                time.sleep(2 * BEAT_SECONDS)
                signs.append(self._signs())

        # A thread: a store whose process is stopped never answers, whatever timeout it has been given.
        looking = threading.Thread(target=look_twice, daemon=True)
        looking.start()
        looking.join(2 * BEAT_SECONDS + 2 * STORE_SECONDS)
        if len(signs) < 2:
            return "The store of the process group does not answer: rank 0, or the launcher that holds it, is stopped."
        before, after = signs
        silent = [rank for rank, sign in after.items() if sign is None or sign == before[rank]]
        if silent:
            return "No sign of life from " + ", ".join(_named(rank, after[rank]) for rank in silent) + "."
        where = {rank: sign.split("|", 2)[2] for rank, sign in after.items() if sign is not None}
        return "All ranks are alive: " + ", ".join(f"rank {rank} in {place}" for rank, place in where.items()) + "."

    def _signs(self) -> dict[int, str | None]:
        others = [rank for rank in range(self._ranks) if rank != self._rank]
        return {
            rank: self._store.get(self._key(rank)).decode() if self._store.check([self._key(rank)]) else None
            for rank in others
        }

    def _whereabouts(self) -> str:
        return self._place.what if self._place is not None else "no phase with a limit"

    @staticmethod
    def _key(rank: int) -> str:
        return f"orpo_dist/alive/{rank}"


def _named(rank: int, sign: str | None) -> str:
    if sign is None:
        return f"rank {rank}, which has given none yet"
    _, host, place = sign.split("|", 2)
    return f"rank {rank} on {host}, last seen in {place}"
