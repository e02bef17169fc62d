"""AutoTrain's project class and command line: `AutoTrainProject`, and `orpo-dist llm --train ...` with its flags.

The parameters are translated to a recipe of `orpo-dist train`; everything else is shared with it. docs/autotrain.md
lists every flag and its differences from AutoTrain.
"""

import argparse
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from orpo_dist.autotrain.ignored_options import IGNORED
from orpo_dist.autotrain.params import LLMTrainingParams, explain_unknown, is_flag
from orpo_dist.errors import BAD_INPUT, FAILED, TrainingFailed, UserError

__all__ = ["AutoTrainProject", "LLMTrainingParams", "main"]

BACKENDS = ("local", "slurm")
_REQUIRED = ("model", "data_path", "project_name")
_NOT_HERE = ("deploy", "inference", "interactive")


@dataclass
class AutoTrainProject:
    """A training run as AutoTrain describes it.

    Args:
        params: the parameters.
        backend: `local`: this machine, with one process per GPU. `slurm`: submit a SLURM job and do not wait for it.
        process: AutoTrain's switch for converting the data first. Data is always read, checked and tokenised here, so
            False only prints a note.
        slurm: flags of `orpo-dist submit` for backend slurm, such as `--nodes 2 --time 04:00:00`. They override those
            of the site profile (SITE_SUBMIT).

    Raises:
        UserError: an unknown backend, or `slurm` flags for another backend.
    """

    params: LLMTrainingParams
    backend: str = "local"
    process: bool = True
    slurm: str = ""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UserError(f"backend={self.backend!r} is not in this version of orpo_dist: local or slurm.")
        if self.slurm and self.backend != "slurm":
            raise UserError(f"slurm={self.slurm!r} needs backend='slurm', but backend is {self.backend!r}.")

    def create(self) -> Path:
        """Train, and return the run's folder at the end; with backend slurm, after submitting the job.

        Raises:
            UserError: bad parameters, data or model.
            TrainingFailed: one of several training processes failed and has printed the reason.
            RunStopped: the run stopped on request and can be resumed (a SystemExit with code 75).
        """
        # torch and transformers take seconds to import, and `orpo-dist llm --help` should not wait for them.
        from orpo_dist.autotrain.local import join_processes, print_note, run
        from orpo_dist.autotrain.setup import set_up, with_chat_template

        setup = set_up(self.params, trains_here=self.backend == "local")
        if self.backend == "local":
            join_processes(setup.recipe)
        setup = with_chat_template(setup, self.params)
        if not self.process:
            setup.notes.append("process=False changes nothing: data is always read, checked and tokenised.")
        for note in setup.notes:
            print_note(note)
        if self.backend == "slurm":
            from orpo_dist.autotrain.slurm import submit_project

            submit_project(setup, self.params.distributed_backend, self.slurm)
        else:
            run(setup, self.params.distributed_backend)
        return Path(self.params.project_name)


def main(argv: list[str]) -> int:
    """`orpo-dist llm --train ...`. Returns the exit code.

    Raises:
        UserError: bad flags, parameters, data or model.
    """
    given = vars(_parser().parse_args(argv))
    train, backend, slurm = given.pop("train", False), given.pop("backend", "local"), given.pop("slurm", "")
    asked = [name for name in _NOT_HERE if given.pop(name, False)]
    if asked:
        raise UserError(f"--{asked[0]} is not supported: orpo-dist only trains (orpo-dist llm --train ...).")
    if not train:
        raise UserError("Say what to do: orpo-dist llm --train --model ... --data-path ... --project-name ...")
    missing = [_spellings(name)[0] for name in _REQUIRED if name not in given]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: say what to train, on what, and where to write it.")
    project = AutoTrainProject(LLMTrainingParams(**given), backend, slurm=slurm)

    try:
        project.create()
    except TrainingFailed as failure:
        if failure.exit_code != BAD_INPUT:  # for bad input the processes have printed a readable message
            print(f"orpo-dist: {failure}", file=sys.stderr)
        return failure.exit_code if failure.exit_code > 0 else FAILED
    return 0


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as a UserError, with the nearest name."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, rest = self.parse_known_args(args, namespace)
        unknown = [word for word in rest if word.startswith("--")]
        if unknown:
            names = [word.removeprefix("--").split("=")[0].replace("-", "_") for word in unknown]
            raise UserError("\n".join(f"--{explain_unknown(name)}" for name in names))
        if rest:
            raise UserError(f"{' '.join(rest)!r} belongs to no flag: is a `--flag` or a quotation mark missing?")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"orpo-dist llm: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="orpo-dist llm",
        description="Train with AutoTrain's flags; --a-b and --a_b are the same. docs/autotrain.md explains each.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name, help in [
        ("train", "Train."),
        *((name, argparse.SUPPRESS) for name in _NOT_HERE),
    ]:
        parser.add_argument(f"--{name}", action="store_true", help=help)
    parser.add_argument("--backend", help="local: this machine (default). slurm: submit a job.")
    parser.add_argument("--slurm", metavar="FLAGS", help='Flags of orpo-dist submit: "--nodes 2 --time 04:00:00".')
    for option in fields(LLMTrainingParams):
        help = f"{option.metadata['help']} Default: {option.default}.".replace("%", "%%")
        if is_flag(option.name):
            parser.add_argument(*_spellings(option.name), nargs="?", const=True, metavar="true|false", help=help)
            parser.add_argument(
                *_spellings(f"no_{option.name}"), dest=option.name, action="store_false", help=argparse.SUPPRESS
            )
        else:
            parser.add_argument(*_spellings(option.name), metavar="X", help=help)
    for name in IGNORED:
        parser.add_argument(*_spellings(name), *_spellings(f"no_{name}"), dest=name, nargs="?", help=argparse.SUPPRESS)
    return parser


def _spellings(name: str) -> list[str]:
    """`--a-b` first, then `--a_b`."""
    return list(dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]))
