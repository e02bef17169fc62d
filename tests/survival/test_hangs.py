"""A rank that is stopped ends the run after the limit of its phase; the last lines name phase, rank and host."""

import os
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks.kill_campaign import REPOSITORY, START_SECONDS, command, make_inputs, newest, recipe

LIMITS = {"ddp_timeout": 7200, "save_timeout": 7201, "eval_timeout": 7202, "last_act_timeout": 7203}
OPTION = {"step": "ddp_timeout", "save": "save_timeout", "evaluation": "eval_timeout", "last_act": "last_act_timeout"}
PLACE = {
    "step": "step 3",
    "save": "the save of step 2",
    "evaluation": "the evaluation of step 2",
    "last_act": "the model card and the summary",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def told_by(folder: Path, runs: Path, phase: str, topology: str) -> tuple[int, str, Path]:
    """Exit code, what was printed, and the run's folder. Only the limit of `phase` is short."""
    rank = 0 if phase == "last_act" else 1
    output, path = runs / "out", runs / "recipe.yaml"
    changes = LIMITS | {OPTION[phase]: 12, "max_steps": 3, "save_steps": 2, "eval_steps": 2}
    path.write_text(yaml.safe_dump(recipe(folder, output, topology) | changes))
    launch = command(folder, topology, path)
    launch = launch[: next(i for i, word in enumerate(launch) if word.endswith("kill_campaign_rank.py"))]
    script = [str(Path(__file__).parent / "stopped.py"), phase, str(rank), "train", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "ORPO_DIST_CACHE": str(runs / "cache")}
    log = runs / "log"
    with log.open("w") as file:
        running = subprocess.Popen([*launch, *script], env=environment, stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + START_SECONDS
    try:
        while running.poll() is None and time.monotonic() < deadline:
            if "has waited longer" in log.read_text():
                kill_ranks(path)  # a stopped process does not hear SIGTERM, and torchrun gives it 30 s
            time.sleep(0.5)
    finally:
        kill_ranks(path)
    return running.wait(START_SECONDS), log.read_text(), output


def kill_ranks(path: Path) -> None:
    for process in psutil.process_iter(["cmdline", "status"]):
        if str(path) in (process.info["cmdline"] or []) and process.info["status"] == psutil.STATUS_STOPPED:
            process.kill()


def check(folder: Path, runs: Path, phase: str, topology: str) -> None:
    code, told, output = told_by(folder, runs, phase, topology)
    assert code != 0, told[-9000:]
    silent, waiting = (0, 1) if phase == "last_act" else (1, 0)
    host = socket.gethostname()
    line = (
        f"orpo-dist: rank {waiting} of 2 on {host} has waited longer than 12 s in {PLACE[phase]} ({OPTION[phase]}). "
        f"No sign of life from rank {silent} on {host}, last seen in "
    )
    assert line in told, told[-9000:]
    assert newest(output) == {"step": 2, "save": 0, "evaluation": 0, "last_act": 3}[phase]
    assert not (output / "run_summary.json").exists()


# A step under DDP: test_deaths.py.
@pytest.mark.topology
@pytest.mark.parametrize(
    ("phase", "topology"), [("save", "ddp"), ("evaluation", "ddp"), ("step", "zero3"), ("last_act", "fsdp2")]
)
def test_a_stopped_rank_is_named_with_its_phase(folder, tmp_path, phase, topology):
    check(folder, tmp_path, phase, topology)
