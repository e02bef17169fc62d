"""Runs SLURM's commands and parses their output."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orpo_dist.errors import UserError

COMMENT = "orpo-dist:"  # a job's comment names its run: orpo-dist:/shared/runs/a
_FIELDS = ("job_id", "state", "partition", "nodes", "elapsed", "limit", "reason", "comment")
_FORMAT = "%i\x1f%T\x1f%P\x1f%D\x1f%M\x1f%l\x1f%R\x1f%k"
SECONDS = 60  # for one answer of SLURM
LEAST_VERSION = (20, 11)  # srun --overlap: https://github.com/SchedMD/slurm/blob/slurm-20.11/RELEASE_NOTES


@dataclass(frozen=True)
class QueuedJob:
    """A job in SLURM's queue."""

    job_id: str
    state: str
    partition: str
    nodes: str
    elapsed: str
    limit: str
    reason: str
    comment: str

    @property
    def run_folder(self) -> Path | None:
        return Path(self.comment.removeprefix(COMMENT)) if self.comment.startswith(COMMENT) else None

    @property
    def is_active(self) -> bool:
        return self.state not in _ENDED


_ENDED = {"CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


@dataclass(frozen=True)
class PartitionNodes:
    """A group of equal nodes: how many, CPUs and GPUs of each, and the partition's time limit."""

    nodes: int
    cpus: int
    gpus: int
    limit: str


def call(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Run one of SLURM's commands, with further variables, and return its output.

    Raises:
        UserError: SLURM is not installed here, does not answer, or rejects the command.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not on this machine: run this on a login node of a SLURM cluster.")
    try:
        variables = {**os.environ, **(environment or {})}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} did not answer within {SECONDS} s: is slurmctld up?") from error
    if done.returncode != 0:
        raise UserError(f"{command[0]} refuses:\n{(done.stderr or done.stdout).strip()}")
    return done.stdout


def check_version() -> None:
    """Raises UserError for a SLURM that is too old for the templates."""
    text = call("sbatch", "--version").strip()
    match = re.search(r"(\d+)\.(\d+)\S*$", text)
    if match and (int(match[1]), int(match[2])) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise UserError(f"{text} is too old: the templates need SLURM {least} or newer.")


def sbatch(script: Path, dependency: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Submit a script, with further variables in the job's environment. Returns the job id."""
    options = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    return call("sbatch", "--parsable", *options, str(script), environment=environment).strip().split(";")[0]


def jobs(job_ids: Sequence[str] = ()) -> list[QueuedJob]:
    """The user's jobs that SLURM still knows, or those with the given ids."""
    which = [f"--jobs={','.join(job_ids)}"] if job_ids else ["--me"]
    lines = call("squeue", "--noheader", f"--format={_FORMAT}", *which).splitlines()
    return [QueuedJob(*line.split("\x1f")) for line in lines if line.count("\x1f") == len(_FIELDS) - 1]


def partition_nodes(partition: str | None) -> list[PartitionNodes]:
    """The nodes of a partition (None: the default one).

    Raises:
        UserError: there is no such partition.
    """
    lines = call("sinfo", "--noheader", "--format=%P|%D|%c|%G|%l").splitlines()
    found, names = [], []
    for line in lines:
        name, nodes, cpus, gres, limit = line.split("|")
        names.append(name.rstrip("*"))
        if name.rstrip("*") == partition or (partition is None and name.endswith("*")):
            found.append(PartitionNodes(int(nodes), int(cpus.rstrip("+")), _gpus_of(gres), limit))
    if partition is not None and not found:
        raise UserError(f"--partition {partition}: the partitions here are {', '.join(dict.fromkeys(names))}.")
    return found


def _gpus_of(gres: str) -> int:
    """`gpu:a100:8(S:0-1),tmp:100` has 8."""
    counts = [word.split("(")[0].split(":")[-1] for word in gres.split(",") if word.startswith("gpu")]
    return sum(int(count) for count in counts if count.isdigit())
