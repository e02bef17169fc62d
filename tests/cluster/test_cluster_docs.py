"""The files of docs/clusters.md, each complete: run with commands that start tasks as the scheduler's would."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orpo_dist.cli import main
from orpo_dist.recipe.preview import preview

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "clusters.md").read_text("utf-8")
FILES = {
    title: text
    for title, text in re.findall(r"^## ([^\n]+)\n+```(?:bash|yaml)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
}
HOSTS = ("n1", "n2")

# Each starts its command once on each of two nodes, as the real one does.
PBSDSH = """#!/bin/bash
shift  # --
for node in 0 1; do
    env -i PATH="$PATH" PYTHONPATH="$PYTHONPATH" PYTHON="$PYTHON" ORPO_DIST_CACHE="$ORPO_DIST_CACHE" CONFIG=ddp \\
        PBS_JOBID=77.server PBS_NODEFILE=/gone PBS_NODENUM=$node PBS_TASKNUM=$((node + 2)) \\
        bash -c "${3/source .venv\\/bin\\/activate/true}"
done
"""
BLAUNCH = """#!/bin/bash
for task in 1 2; do LSF_PM_TASKID=$task "$@"; done
"""
MPIRUN = """#!/bin/bash
[[ "$*" == *"--map-by ppr:1:node "* ]] || exit 9
while [[ $1 == -* ]]; do case $1 in -x) export "${2?}"; shift 2 ;; --*) shift 2 ;; esac; done
for rank in 0 1; do
    OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=1 OMPI_COMM_WORLD_RANK=$rank PMIX_RANK=$rank "$@"
done
"""


@pytest.fixture
def place(tmp_path):
    """A folder to submit from: recipe, scripts, an environment to activate; and the scheduler's commands."""
    (tmp_path / "bin").mkdir()
    for name, text in (("pbsdsh", PBSDSH), ("blaunch", BLAUNCH), ("mpirun", MPIRUN)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o700)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "full.yaml").write_text("model_name_or_path: tiny\ndataset_name: pairs.jsonl\n")
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    (tmp_path / "hosts.txt").write_text("n1 slots=8\nn2 slots=8\n")
    (tmp_path / "nodes").write_text("n1\nn2\n")
    return tmp_path


SHELL = {
    "PBS": {"PBS_NODEFILE": "nodes", "PBS_JOBID": "77.server"},
    "LSF": {"LSB_JOBID": "77", "LSB_MCPU_HOSTS": "n1 1 n2 1", "LSB_HOSTS": "n1 n2"},
    "mpirun": {},
}


def test_one_file_for_each_scheduler():
    assert list(FILES) == [*SHELL, "Kubernetes, an indexed Job", "Kubernetes, a PyTorchJob"]


@pytest.mark.parametrize("title", SHELL)
def test_shell(title, place):
    script = place / "job.sh"
    script.write_text(FILES[title])
    # launch/multi_node.sh itself, on this machine: it checks the node and prints what it would start.
    script.write_text(FILES[title].replace("launch/multi_node.sh ", "launch/multi_node.sh --dry-run --cpu "))
    check = Path(sys.executable).with_name("shellcheck")
    if check.exists():
        subprocess.run([check, "--exclude=SC1091", script], check=True, timeout=60)
    variables = {name: str(place / value) if value == "nodes" else value for name, value in SHELL[title].items()}
    done = subprocess.run(
        ["bash", script],
        cwd=place,
        env={
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHON": sys.executable,
            "ORPO_DIST_CACHE": str(place / "cache"),
            "CONFIG": "ddp",
            "PBS_O_WORKDIR": str(place),
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    port = 10077 if title == "LSF" else 29500
    for node, line in enumerate(done.stdout.splitlines()):
        assert f"--nnodes=2 --nproc_per_node=1 --node_rank={node} --master_addr=n1 --master_port={port}" in line
        check_flags(shlex.split(line)[shlex.split(line).index("train") + 1 :], place)
    assert len(done.stdout.splitlines()) == 2


def check_flags(words, place):
    """The recipe and its flags are what training reads."""
    view = preview(place / words[0], words[1:])
    assert view.values["resume_from_checkpoint"] == "auto"
    from orpo_dist.recipe.recipe import Recipe

    Recipe.parse([str(place / words[0]), *words[1:], "--output_dir", str(place / "run"), "--use_cpu", "true"])


def launched(container, place, monkeypatch, capsys, **variables) -> str:
    """What the pod's command prints with --dry-run under its variables."""
    words = [*container["command"], *container["args"]]
    assert words[:2] == ["orpo-dist", "launch"]
    monkeypatch.chdir(place)
    monkeypatch.setenv("ORPO_DIST_CACHE", str(place / "cache"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = ["launch", "--dry-run", "--cpu", "--accelerate-config", "ddp"]
    assert main([*options, *words[2:]]) == 0
    return capsys.readouterr().out


def mounts_exist(pod):
    names = {volume["name"] for volume in pod["volumes"]}
    assert all(mount["name"] in names for mount in pod["containers"][0]["volumeMounts"])


@pytest.mark.parametrize("index", [0, 1])
def test_an_indexed_job(index, place, monkeypatch, capsys):
    service, job = yaml.safe_load_all(FILES["Kubernetes, an indexed Job"])
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    mounts_exist(pod)
    assert job["spec"]["completionMode"] == "Indexed"
    nodes = str(job["spec"]["completions"])
    assert nodes == str(job["spec"]["parallelism"]) == container["command"][container["command"].index("--nodes") + 1]
    # The first pod's name: JOB-0.SUBDOMAIN, of a headless service that selects the job's pods.
    head = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [2, 3] and pod["restartPolicy"] == "Never"
    printed = launched(container, place, monkeypatch, capsys, JOB_COMPLETION_INDEX=str(index))
    assert f"--nnodes={nodes} --nproc_per_node=1 --node_rank={index} --master_addr={head} " in printed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pytorchjob(rank, place, monkeypatch, capsys):
    job = yaml.safe_load(FILES["Kubernetes, a PyTorchJob"])
    replicas = job["spec"]["pytorchReplicaSpecs"]
    nodes = str(sum(replica["replicas"] for replica in replicas.values()))
    pod = replicas["Worker"]["template"]["spec"]
    mounts_exist(pod)
    # pkg/controller.v1/pytorch/envvar.go of the training operator
    variables = {"MASTER_ADDR": "orpo-master-0", "MASTER_PORT": "23456", "RANK": str(rank)}
    variables |= {"WORLD_SIZE": str(int(nodes) * 8), "PET_NNODES": nodes, "PET_NODE_RANK": str(rank)}
    variables["PET_NPROC_PER_NODE"] = job["spec"]["nprocPerNode"]
    printed = launched(pod["containers"][0], place, monkeypatch, capsys, **variables)
    where = f"--nnodes={nodes} --nproc_per_node=8 --node_rank={rank} --master_addr=orpo-master-0 --master_port=23456"
    assert where in printed and printed.startswith("env -u PET_NNODES")
