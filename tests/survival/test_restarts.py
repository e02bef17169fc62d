"""`orpo-dist launch --max-restarts`: a rank that is killed costs the steps since the last checkpoint, and nothing else.

On one node, and on two under the variables of an MPI launcher, where the ranks of the other node have to end too.
"""

import os
import re
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from benchmarks.kill_campaign import REPOSITORY, START_SECONDS, make_inputs, newest, recipe, same_weights

STEPS, KILL_AFTER = 16, 4
OPTIONS = ["--cpu", "--accelerate-config", "ddp", "--max-restarts", "2"]

pytestmark = pytest.mark.topology


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restarts")
    make_inputs(folder)
    return folder


def launched(folder, output, command, **environment) -> subprocess.Popen:
    path = folder / f"{output.name}.yaml"
    changes = {"max_steps": STEPS, "eval_strategy": "no", "dataset_test_split": None, "save_steps": 2}
    path.write_text(yaml.safe_dump({**recipe(folder, output, "ddp"), **changes}))
    return subprocess.Popen(
        [*map(str, command), str(path)],
        env={
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "ORPO_DIST_CACHE": str(folder / "cache"),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_a_rank(launcher, output) -> None:
    """The last rank below a launcher, once there is a checkpoint."""
    deadline = time.monotonic() + START_SECONDS
    while newest(output) < KILL_AFTER:
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()[0][-3000:]
        time.sleep(0.005)
    ranks = [child for child in psutil.Process(launcher.pid).children() if "train" in child.cmdline()]
    ranks[-1].kill()


def ended(launcher) -> tuple[int, str]:
    told, _ = launcher.communicate(timeout=START_SECONDS)
    return launcher.returncode, told


@pytest.fixture(scope="module")
def whole(folder):
    """The run that nobody touched."""
    output = folder / "whole"
    run = launched(
        folder, output, [sys.executable, "-m", "orpo_dist.cli", "launch", *OPTIONS, "--processes-per-node", "2"]
    )
    code, told = ended(run)
    assert code == 0, told[-3000:]
    return output


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_rank_of_one_node(folder, whole):
    output = folder / "killed"
    launch = [sys.executable, "-m", "orpo_dist.cli", "launch", *OPTIONS, "--processes-per-node", "2"]
    run = launched(folder, output, launch)
    kill_a_rank(run, output)
    code, told = ended(run)
    assert code == 0, told[-3000:]
    line = re.search(
        r"restart 1 of 2: rank 1 was killed by SIGKILL at step (\d+); resuming from checkpoint-(\d+)", told
    )
    assert line and KILL_AFTER <= int(line[2]) <= int(line[1]), told[-3000:]
    assert told.count("orpo-dist: restart") == 1 and f"Resuming from {output / f'checkpoint-{line[2]}'}" in told
    assert same_weights(whole, output)


def test_a_killed_rank_of_two_nodes(folder, whole):
    """As mpirun starts them: launch/multi_node.sh on each node, which finds its place in the variables."""
    output = folder / "two-nodes"
    with socket.create_server(("", 0)) as probe:
        port = str(probe.getsockname()[1])
    variables = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "PMIX_NAMESPACE": "prterun-n1@1"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GPUS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = [REPOSITORY / "launch" / "multi_node.sh", *OPTIONS]
    ranks = [{"OMPI_COMM_WORLD_RANK": str(rank), "PMIX_RANK": str(rank)} for rank in range(2)]
    nodes = [launched(folder, output, script, **variables, **rank) for rank in ranks]
    kill_a_rank(nodes[1], output)
    ends = [ended(node) for node in nodes]
    for number, (code, told) in enumerate(ends):
        assert code == 0, told[-3000:]
        assert f"node {number} of 2, head 127.0.0.1:{port} (from OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK" in told
        assert re.search(r"restart 1 of 2: rank 1 was killed by SIGKILL at step \d+; resuming from", told), told[-3000:]
    assert same_weights(whole, output)
