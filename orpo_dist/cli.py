"""The command line: `orpo-dist COMMAND ...`. Each command is a module with a `main(argv) -> exit code`."""

import importlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence

from orpo_dist.cluster.ends import recorded_end
from orpo_dist.distributed.environment import LaunchedRank, launched_rank
from orpo_dist.errors import (
    BAD_INPUT,
    FAILED,
    FINISHED,
    GAVE_UP,
    INTERRUPTED,
    STOPPED,
    NonFiniteRun,
    RankError,
    RunStopped,
    SaveError,
    UserError,
)
from orpo_dist.options.secrets import hide_own_flags, with_private_flags
from orpo_dist.version import __version__

# Command: module, line of help. A module is imported when its command runs: `--help` should not wait for torch.
COMMANDS = {
    "train": ("orpo_dist.train", "train from a recipe: RECIPE.yaml [--field value ...]"),
    "llm": ("orpo_dist.autotrain.project", "train with AutoTrain's flags"),
    "data": ("orpo_dist.commands.data", "check DATA or count it: check|stats DATA"),
    "launch": ("orpo_dist.cluster.launch", "start the processes of a run on this node: RECIPE.yaml"),
    "prefetch": ("orpo_dist.cluster.prefetch", "fetch a run's model and data and tokenise them: RECIPE.yaml"),
    "submit": ("orpo_dist.cluster.submit", "run as a SLURM job: RECIPE.yaml --nodes N --gpus-per-node G --time T"),
    "status": ("orpo_dist.cluster.status", "the state of jobs and their runs: [RUN|JOB ...]"),
    "cancel": ("orpo_dist.cluster.cancel", "end jobs, with a checkpoint: RUN|JOB ..."),
    "merge": ("orpo_dist.commands.merge", "merge a run's adapter into its base model: RUN"),
    "convert-checkpoint": (
        "orpo_dist.commands.convert_checkpoint",
        "resume a ZeRO run with another number of processes: CHECKPOINT",
    ),
    "doctor": ("orpo_dist.commands.doctor", "what this machine has, what is missing and how to fix it"),
    "demo": ("orpo_dist.demo.command", "a small model, a small preference set, before and after"),
}
PEER_SECONDS = 1.0  # torchrun polls its processes ten times a second
# transformers has an option of the same name, with a value.
_DEBUG_VALUES = {"underflow_overflow", "tpu_metrics_debug"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 finished, 2 bad input (one readable message), 3 too many non-finite steps, 75
    stopped and resumable, 1 any other failure.

    `--debug`, anywhere on the command line, also shows the traceback of bad input.
    """
    if argv is None:
        hide_own_flags()
        argv = with_private_flags(sys.argv[1:])
    arguments, debug = _without_debug_flag(list(argv))
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(_help())
        return FINISHED
    if command == "--version":
        print(f"orpo-dist {__version__}")
        return FINISHED
    try:
        if command not in COMMANDS:
            raise UserError(f"{command!r} is not a command. Commands: {', '.join(COMMANDS)}.")
        with recorded_end():
            return importlib.import_module(COMMANDS[command][0]).main(arguments[1:])
    except UserError as error:
        if debug:
            raise
        _print_error(error)
        return BAD_INPUT
    except (NonFiniteRun, SaveError) as error:
        if debug:
            raise
        _print_error(error)
        return GAVE_UP if isinstance(error, NonFiniteRun) else FAILED
    except RunStopped as stop:
        launched = launched_rank()
        if (launched is None or launched.is_first) and not stop.printed:
            print(f"orpo-dist: {stop}", file=sys.stderr)
        return STOPPED
    except SystemExit as stop:  # raised by argparse after --help or a wrong flag
        return stop.code if isinstance(stop.code, int) else FINISHED if stop.code is None else FAILED
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        launched = launched_rank()
        if launched is None:
            raise
        _print_death(error, launched)
        return FAILED


def _without_debug_flag(arguments: list[str]) -> tuple[list[str], bool]:
    rest: list[str] = []
    debug = False
    for position, argument in enumerate(arguments):
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if argument == "--debug" and following not in _DEBUG_VALUES:
            debug = True
        else:
            rest.append(argument)
    return rest, debug


def _print_error(error: Exception) -> None:
    """Print once per node if every rank fails in the same way: a file may be missing on one node only."""
    launched = launched_rank()
    if launched is None or launched.speaks_for_node or isinstance(error, RankError | SaveError):
        where = "" if launched is None or launched.is_first else f" (rank {launched.rank})"
        print(f"orpo-dist: error{where}: {error}", file=sys.stderr)


def _print_death(error: Exception, launched: LaunchedRank) -> None:
    """Print the traceback and a last line with rank, host and reason, since many ranks share one terminal. torchrun
    repeats the error that is recorded in its error file.

    torchrun reports the earliest failure as the root cause, and sees a killed process only when it polls. A rank that
    fails because it lost a peer would be earlier, so it waits: torchrun ends it meanwhile.
    """
    traceback.print_exc()
    reason = str(error).strip().split("\n", maxsplit=1)[0]
    where = f"rank {launched.rank} of {launched.world_size} on {socket.gethostname()}"
    print(f"orpo-dist: {where} failed: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        if launched.world_size > 1:
            time.sleep(PEER_SECONDS)
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: orpo-dist COMMAND [ARGUMENTS] [--debug]",
            "",
            *lines,
            "",
            "`orpo-dist COMMAND --help` lists a command's arguments; `--version` prints the version.",
            "Exit codes: 0 finished, 2 bad input, 3 too many non-finite steps, 75 stopped and resumable, 1 failed.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
