"""A shared folder to train in, a SLURM of two nodes, and what tests ask them."""

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from orpo_dist.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, GATE = 24, 12
# Every wait is this long at most; machines that run tests may be busy with others.
SECONDS = 1200


@dataclass(frozen=True)
class Workplace:
    """A shared folder with a tiny model, pairs and a recipe: 24 steps of 4 pairs, for any number of processes."""

    folder: Path
    recipe: Path
    environment: dict[str, str]

    def run(self, *command: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            cwd=self.folder,
            env=self.environment | environment,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def here(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """The command line in this process, which has paid for its imports. Returns the exit code and what it said."""
        said = io.StringIO()
        with (
            patch.dict(os.environ, self.environment | environment),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            return main(arguments), said.getvalue()

    def orpo_dist(self, *arguments: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", "orpo_dist.cli", *arguments, check=check, **environment)


@dataclass(frozen=True)
class Slurm:
    """The test cluster, and what tests ask it."""

    workplace: Workplace

    def submit(self, name: str, *options: str, **environment: str) -> str:
        """`orpo-dist submit` of the recipe into the run `name`; the id of the (last) job."""
        flags = ["--gpus-per-node", "0", "--time", "60:00", *options, "--output_dir", str(self.run_folder(name))]
        code, said = self.workplace.here("submit", str(self.workplace.recipe), *flags, **environment)
        assert code == 0, said
        return re.search(r"^Submitted jobs? (.*)$", said, re.MULTILINE)[1].split(", ")[-1]

    def run_folder(self, name: str) -> Path:
        return self.workplace.folder / "runs" / name

    def command(self, *command: str) -> str:
        return self.workplace.run(*command).stdout

    def state(self, job_id: str) -> str:
        """`COMPLETED`, `PENDING`, ... of a job and, for an array, of its tasks."""
        text = self.command("scontrol", "show", "job", job_id)
        return " ".join(sorted(set(re.findall(r"JobState=(\w+)", text))))

    def restarts(self, job_id: str) -> int:
        return int(re.search(r"Restarts=(\d+)", self.command("scontrol", "show", "job", job_id))[1])

    def wait_for(self, job_id: str, *states: str) -> str:
        """Wait until a job is in one of the states, and for its end in any case."""
        ends = {*states, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        return until(lambda: (state := self.state(job_id)) in ends and state, f"job {job_id} in {states}", self.story)

    def wait_for_gate(self, name: str, ranks: int = 2) -> None:
        folder = self.run_folder(name)
        until(lambda: len(list(folder.glob("at_gate.*"))) == ranks, f"{name} at its gate", lambda: self.story(name))

    def finished(self, name: str, job_id: str, *, attempts: int) -> Path:
        """Wait for the job's good end, after so many attempts. Returns the run's folder."""
        state = self.wait_for(job_id, "COMPLETED")
        assert state == "COMPLETED", f"{state}\n{self.story(name)}"
        folder = self.run_folder(name)
        assert (folder / "run_summary.json").is_file()
        assert (folder / "slurm" / "attempt").read_text().strip() == str(attempts), self.story(name)
        return folder

    def story(self, name: str | None = None) -> str:
        """Everything that was logged, for a test that fails."""
        folder = self.run_folder(name) if name else self.workplace.folder / "runs"
        files = sorted(folder.rglob("slurm/logs/*.log"), key=lambda path: path.stat().st_mtime)[-6:]
        return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in files) + self.command("squeue", "-a")


def until(true: Callable, what: str, story: Callable[[], str] = str):
    """Wait until `true()` is, and return it."""
    deadline = time.monotonic() + SECONDS
    while not (result := true()):
        assert time.monotonic() < deadline, f"waited {SECONDS} s for: {what}\n{story()}"
        time.sleep(1)
    return result


def assert_same_weights(folder: Path, reference: dict[str, torch.Tensor]) -> None:
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    assert weights.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(weights[name].float(), tensor.float(), rtol=1e-4, atol=1e-6, msg=name)
