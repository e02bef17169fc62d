"""`orpo-dist status [RUN|JOB ...]`: the state of jobs and their runs."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_dist.cluster import slurm
from orpo_dist.errors import UserError


@dataclass(frozen=True)
class RunState:
    """The state of a run, read from its folder.

    Attributes:
        outcome: how its last attempt ended, as written by slurm/lib.sh; "" before the first end.
        step: the last logged optimizer step.
        checkpoint: the newest complete checkpoint.
    """

    folder: Path
    attempt: int
    outcome: str
    step: int | None
    loss: float | None
    checkpoint: str | None
    excluded: str

    @classmethod
    def read(cls, folder: Path) -> "RunState":
        state = folder / "slurm"
        step, loss = _last_step(folder / "log.jsonl")
        return cls(
            folder=folder,
            attempt=_count(_text(state / "attempt")),
            outcome=_text(state / "outcome"),
            step=step,
            loss=loss,
            checkpoint=newest_checkpoint(folder),
            excluded=" ".join(sorted(set(_text(state / "excluded").split()))),
        )

    def lines(self) -> list[str]:
        step = "no step yet" if self.step is None else f"step {self.step}"
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        lines = [f"  attempt {self.attempt}, {step}{loss}, newest checkpoint: {self.checkpoint or 'none'}"]
        lines += [f"  last outcome: {self.outcome}"] if self.outcome else []
        lines += [f"  excluded nodes: {self.excluded}"] if self.excluded else []
        return lines


def main(argv: Sequence[str]) -> int:
    """`orpo-dist status`. Returns 0.

    Raises:
        UserError: there is no such run or job.
    """
    parser = argparse.ArgumentParser(
        prog="orpo-dist status",
        description="The state of jobs and their runs. Without arguments: all of your jobs.",
        allow_abbrev=False,
    )
    parser.add_argument("which", nargs="*", metavar="RUN|JOB", help="A run's folder or the id of a job.")
    which = parser.parse_args(argv).which
    print("\n".join(report(which)))
    return 0


def report(which: Sequence[str]) -> list[str]:
    """The lines that `status` prints. Raises UserError as main does."""
    queued = [job for job in slurm.jobs() if job.run_folder is not None]
    if not which:
        folders = list(dict.fromkeys(job.run_folder for job in queued if job.is_active))
        if not folders:
            return ["No job of orpo-dist is waiting or running. `orpo-dist status RUN` shows a run that has ended."]
    else:
        folders = list(dict.fromkeys(folder_of(word, queued) for word in which))
    lines = []
    for folder in folders:
        assert folder is not None
        lines.append(f"{folder}{': finished' if (folder / 'slurm' / 'done').exists() else ''}")
        for job in queued:
            if job.run_folder == folder and job.is_active:
                lines.append(
                    f"  job {job.job_id} {job.state.lower()} in {job.partition}, nodes: {job.nodes}, {job.elapsed} of "
                    f"{job.limit} ({job.reason})"
                )
        runs = [folder, *sorted(path.parent for path in folder.glob("*/slurm") if path.parent.name.isdigit())]
        for run in runs:
            if (run / "slurm" / "attempt").exists():
                lines += [] if run == folder else [f"  run {run.name}"]
                lines += RunState.read(run).lines()
    return lines


def folder_of(word: str, queued: Sequence[slurm.QueuedJob]) -> Path:
    """The run's folder for a folder or the id of a queued job.

    Raises:
        UserError: there is no such run or job.
    """
    if re.fullmatch(r"\d+(_\d+)?", word):
        for job in queued:
            if word in (job.job_id, job.job_id.split("_")[0]) and job.run_folder is not None:
                return job.run_folder
        raise UserError(f"SLURM does not list a job {word} of orpo-dist (any more): give the run's folder.")
    folder = Path(word).absolute()
    if not (folder / "slurm").is_dir():
        raise UserError(f"{word} is not a submitted run: it has no folder slurm/.")
    return folder


def newest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint."""
    steps = [
        int(marker.parent.name.removeprefix("checkpoint-"))
        for marker in folder.glob("checkpoint-*/complete.json")
        if marker.parent.name.removeprefix("checkpoint-").isdigit()
    ]
    return f"checkpoint-{max(steps)}" if steps else None


def _last_step(log: Path) -> tuple[int | None, float | None]:
    step = loss = None
    for line in _text(log).splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # a partial line, still being written, or what a full disk has left
            continue
        if isinstance(event, dict):
            step, loss = _number(event.get("step"), step), _number(event.get("loss"), loss)
    return step, loss


def _count(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _number(value: Any, otherwise: Any) -> Any:
    return value if isinstance(value, int | float) else otherwise


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
