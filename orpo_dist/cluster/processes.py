"""Starts the training processes of one node: builds the launcher's command and runs it in this process.

As a separate command, the launcher (accelerate launch, or torchrun for DDP on a CPU) turns every exit code of its
processes into 1. Here the codes are read from the exception it raises, so that 2 (bad input), 3 (non-finite steps) and
75 (stopped, can be resumed) reach the caller that restarts runs.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from orpo_dist.cluster.orphans import on_death_of_parent
from orpo_dist.cluster.schedulers import rank_variables
from orpo_dist.errors import BAD_INPUT, FAILED, FINISHED, GAVE_UP, STOPPED, RunStopped
from orpo_dist.run.stop import heed_signals

DEFAULT_PORT = 29500
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Processes get the signals above from this launcher or from SLURM; torchrun's handler would kill them after 30 s.
_LEFT_TO_TORCHRUN = (signal.SIGQUIT,)
# It reports each failed process with its exit code, as `_print_ends` does.
_TORCHRUNS_REPORT = "torch.distributed.elastic.multiprocessing.api"


@dataclass(frozen=True)
class Placement:
    """The place of this node in the run; `processes` per node."""

    nodes: int = 1
    node_rank: int = 0
    head: str = "localhost"
    port: int = DEFAULT_PORT
    processes: int = 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes


def launcher_command(
    name: str, config: Path, placement: Placement, recipe: str, flags: Sequence[str], cpu: bool = False
) -> list[str]:
    """The command that starts this node's processes.

    On a CPU accelerate starts several processes for DeepSpeed and FSDP only, so DDP uses torchrun there.
    """
    train = ["orpo_dist.cli", "train", recipe, *flags]
    if name == "ddp" and cpu:
        where = [f"--nnodes={placement.nodes}", f"--nproc_per_node={placement.processes}"]
        if placement.nodes > 1:
            where += [f"--node_rank={placement.node_rank}"]
            where += [f"--master_addr={placement.head}", f"--master_port={placement.port}"]
        else:
            where += ["--standalone"]
        return [sys.executable, "-m", "torch.distributed.run", *where, "-m", *train]
    where = ["--num_machines", str(placement.nodes), "--num_processes", str(placement.world_size)]
    if placement.nodes > 1:
        where += ["--machine_rank", str(placement.node_rank)]
        where += ["--main_process_ip", placement.head, "--main_process_port", str(placement.port)]
    else:
        where += ["--main_process_port", "0"]  # any free port: two runs may share the machine
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launch, *where, "--module", *train]


@dataclass(frozen=True)
class GroupEnd:
    """How the training processes of this node ended.

    Attributes:
        code: as `run_launcher` returns it.
        cause: the end of the process that ended the others: `rank 3 was killed by SIGKILL`; "" if none failed.
        asked: the signal that asked this launcher to stop.
    """

    code: int
    cause: str = ""
    asked: str | None = None


def run_launcher(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a command of `launcher_command` in this process, with further variables for the training processes.

    Variables, signal handlers and logging are restored on return. Outside the main thread signal handlers are not
    changed.

    Returns the most informative exit code of the local processes that failed: 2 before 3 before any other
    (128 + number for a signal), 75 only if no process has failed.

    Raises:
        RunStopped: a signal came before there were processes to forward it to.
    """
    return run_group(command, environment).code


def run_group(command: Sequence[str], environment: Mapping[str, str] | None = None) -> GroupEnd:
    """As `run_launcher`; returns also why the processes ended."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    asked: list[str] = []
    with _own_environment(environment or {}), _quiet(_TORCHRUNS_REPORT):
        try:
            with _forwarding_signals(asked):
                launch = _launcher(command[2], list(command[3:]))
                heed_signals()
                launch()
        except ChildFailedError as failure:
            codes = {rank: (end.pid, end.exitcode) for rank, end in sorted(failure.failures.items())}
            code = _code_when_asked(asked, [code for _, code in codes.values()])
            if code not in (BAD_INPUT, STOPPED):  # for these the processes have printed a line
                _print_ends(codes)
            first = sorted(failure.failures.items(), key=lambda item: item[1].timestamp)
            return GroupEnd(code, first_cause([(rank, end.exitcode) for rank, end in first]), next(iter(asked), None))
        except subprocess.CalledProcessError as failure:  # a launcher of a single process
            code = _code_when_asked(asked, [failure.returncode])
            if code not in (BAD_INPUT, STOPPED):
                print(f"orpo-dist: the training process ended with {_in_words(failure.returncode)}.", file=sys.stderr)
            return GroupEnd(code, first_cause([(0, failure.returncode)]), next(iter(asked), None))
    return GroupEnd(FINISHED, "", next(iter(asked), None))


def first_cause(ends: Sequence[tuple[int, int]]) -> str:
    """The end that caused the others, of (rank, exit code) in the order in which they were seen. A rank that was killed
    comes first: it may be seen after one that failed for want of it."""
    killed = [end for end in ends if end[1] < 0 and end[1] != -signal.SIGTERM]
    for rank, code in (*killed, *ends):
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return f"rank {rank} {how}"
    return ""


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def telling_code(codes: Sequence[int]) -> int:
    """The exit code to act on, of several processes (negative: a signal)."""
    for code in (BAD_INPUT, GAVE_UP):
        if code in codes:
            return code
    # A run has stopped only if all of it has: a process that was killed meanwhile is a failure.
    if STOPPED in codes and all(code in (0, STOPPED, -signal.SIGTERM) for code in codes):
        return STOPPED
    # The first process to fail ends on its own; the launcher sends SIGTERM to the others.
    own = (
        [code for code in codes if code not in (0, STOPPED, -signal.SIGTERM)]
        or [code for code in codes if code]
        or [FAILED]
    )
    return own[0] if own[0] > 0 else 128 - own[0]


def _code_when_asked(asked: Sequence[str], codes: Sequence[int]) -> int:
    """`telling_code`, where one signal to stop was forwarded. A process that died of it had just been started, and
    could not heed it yet; a second signal ends processes that could."""
    if len(asked) == 1 and all(code in (0, STOPPED, -signal.SIGTERM, -signal.Signals[asked[0]]) for code in codes):
        return STOPPED
    return telling_code(codes)


def _launcher(module: str, arguments: list[str]) -> Callable[[], object]:
    """The launcher's function. Its imports take seconds, during which no processes exist to forward a signal to."""
    if module == "torch.distributed.run":
        from torch.distributed.run import main

        return partial(main, arguments)
    if module == "orpo_dist.cli":
        return partial(_one_process, [sys.executable, "-m", module, *arguments])
    from accelerate.commands.launch import launch_command, launch_command_parser

    return partial(launch_command, launch_command_parser().parse_args(arguments))


def _one_process(command: list[str]) -> None:
    process = subprocess.Popen(command, preexec_fn=partial(on_death_of_parent, signal.SIGTERM))
    code = process.wait()
    if code:
        raise subprocess.CalledProcessError(code, command)


def _print_ends(codes: Mapping[int, tuple[int, int]]) -> None:
    for rank, (pid, code) in codes.items():
        print(f"orpo-dist: rank {rank} (process {pid}) ended with {_in_words(code)}.", file=sys.stderr, flush=True)


def _in_words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


@contextmanager
def _own_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The launchers read their settings from the environment and leave some behind (torchrun: OMP_NUM_THREADS)."""
    before = dict(os.environ)
    for name in rank_variables(before):
        del os.environ[name]
    os.environ.update(variables)
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in _LEFT_TO_TORCHRUN))
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _forwarding_signals(asked: list[str]) -> Iterator[None]:
    """Forward signals to the training processes, which stop at a step boundary; the launcher waits for them. Their
    names are added to `asked`. A signal that comes before there are processes raises RunStopped.

    Not inside a SLURM step: SLURM signals every process itself, and a second signal would stop them at once.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    this = psutil.Process()
    unrelated = {child.pid for child in this.children()}  # started earlier by the calling script

    def forward(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        asked.append(name)
        processes = [child for child in this.children() if child.pid not in unrelated]
        if not processes:  # not yet: it would be lost, and the run would train to its end
            raise RunStopped(name)
        if "SLURM_STEP_ID" not in os.environ:
            for child in processes:
                with suppress(psutil.NoSuchProcess):
                    child.send_signal(number)

    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, *_LEFT_TO_TORCHRUN)}
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or before[number] != signal.SIG_IGN:  # below nohup a run outlives its terminal
            signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
