"""Runs the launcher of one node (accelerate launch, or torchrun for DDP) in this process, for the sake of its end.

As a command of its own a launcher turns every exit code of its processes into 1. Here the codes are read from the
failure it raises: 2 (bad recipe), 3 (numbers not finite) and 75 (stopped, can be resumed) reach whoever restarts runs.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from orpo_dist.errors import BAD_INPUT, FAILED, FINISHED, GAVE_UP, STOPPED

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# The processes get those from this launcher or from SLURM; torchrun's own handler would kill them after 30 s.
_LEFT_TO_TORCHRUN = "SIGHUP,SIGQUIT"


def run_launcher(command: Sequence[str]) -> int:
    """Run `python -m accelerate.commands.launch ...` or `python -m torch.distributed.run ...` here.

    Returns the exit code that says most about the end: of all local processes that failed, 2 before 3 before 75 before
    any other (128 + number for a signal).
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    module, arguments = command[2], list(command[3:])
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", _LEFT_TO_TORCHRUN)
    try:
        with _forwarding_signals():
            if module == "torch.distributed.run":
                from torch.distributed.run import main

                main(arguments)
            else:
                from accelerate.commands.launch import launch_command, launch_command_parser

                launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as failure:
        code = telling_code([end.exitcode for end in failure.failures.values()])
        if code not in (BAD_INPUT, STOPPED):  # about those the processes themselves have printed a line
            _print_ends(failure)
        return code
    return FINISHED


def telling_code(codes: Sequence[int]) -> int:
    """Of the exit codes of processes (negative: a signal), the one to act on."""
    for code in (BAD_INPUT, GAVE_UP, STOPPED):
        if code in codes:
            return code
    # The first process to fail is killed by nobody; the others get SIGTERM from the launcher.
    own = [code for code in codes if code not in (0, -signal.SIGTERM)] or [code for code in codes if code] or [FAILED]
    return own[0] if own[0] > 0 else 128 - own[0]


def _print_ends(failure: "Exception") -> None:
    for rank, end in sorted(failure.failures.items()):  # type: ignore[attr-defined]
        code = f"signal {-end.exitcode}" if end.exitcode < 0 else f"exit code {end.exitcode}"
        print(f"orpo-dist: rank {rank} (process {end.pid}) ended with {code}.", file=sys.stderr, flush=True)


@contextmanager
def _forwarding_signals() -> Iterator[None]:
    """Signals to this launcher reach its processes, which stop at a step boundary; the launcher waits for them.

    Not inside a SLURM step: SLURM signals every process itself, and a second signal would stop them at once.
    """

    def forward(number: int, _frame: object) -> None:
        if "SLURM_STEP_ID" not in os.environ:
            for pid in _children():
                os.kill(pid, number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    return [
        int(pid)
        for task in Path("/proc/self/task").glob("*/children")
        for pid in task.read_text(encoding="ascii").split()
    ]
