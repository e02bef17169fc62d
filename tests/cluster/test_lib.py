"""Functions of slurm/lib.sh, by themselves."""

import re
import socket
import subprocess
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[2] / "slurm" / "lib.sh"


def shell(folder: Path, script: str, site: str = "", **variables: str) -> subprocess.CompletedProcess:
    """site: the profile; an empty one is a profile."""
    state = folder / "slurm"
    (state / "exit").mkdir(parents=True, exist_ok=True)
    text = f"""
        {site}
        source {LIBRARY}
        RUN={folder} STATE={state} LOGS={state} ATTEMPT=1 RESTARTS=0 LIMIT_AT=9999999999
        scontrol() {{ :; }}; sleep() {{ :; }}
        {script}
    """
    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", **variables}
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("nodes", "step", "code"),
    [
        ([0, 0], 0, 0),
        ([75, 75], 0, 75),
        ([75, 75], 143, 75),  # srun itself was ended, after the nodes
        ([0, 75], 0, 75),
        ([137, 75], 137, 137),  # one launcher was killed, the others saved
        ([75, 1], 1, 1),
        ([75, 1], 0, 1),
        ([75], 137, 137),  # one left no report
        ([75], 0, 75),
        ([75, 2], 0, 2),
        ([1, 3], 1, 3),
        ([143, 1], 1, 1),
        ([], 1, 1),
    ],
)
def test_the_decisive_code(tmp_path, nodes, step, code):
    (tmp_path / "slurm" / "exit").mkdir(parents=True)
    for number, of_node in enumerate(nodes):
        (tmp_path / "slurm" / "exit" / f"1.{number}").write_text(f"{of_node}\n")
    done = shell(tmp_path, f"attempt_code {step}")
    assert done.stdout == f"{code}\n", done.stderr


def test_a_failure_counts_twice_within_one_job_only(tmp_path):
    outcome = tmp_path / "slurm" / "outcome"

    def fails(**variables: str) -> str:
        shell(tmp_path, "CODE=1; conclude", **variables)
        return outcome.read_text()

    assert fails() == "restarting: failed with exit code 1, newest checkpoint: none\n"
    assert fails(SLURM_JOB_ID="99").startswith("restarting: ")
    assert fails(SLURM_JOB_ID="99").startswith("failed (1): failed twice with no new checkpoint")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "complete.json").touch()
    assert fails(SLURM_JOB_ID="99").startswith("restarting: ")
    chain = {"CHAIN": "1700000000"}
    assert fails(SLURM_JOB_ID="100", **chain).startswith("waiting for the next job of the chain")
    assert fails(SLURM_JOB_ID="101", **chain).startswith("failed (1): failed twice")


def test_excluded_nodes_are_of_one_job(tmp_path):
    excluded = tmp_path / "slurm" / "excluded"
    script = 'on_head() { echo "$RUN"; }; SLURM_JOB_NODELIST=n1 PYTHON=python; open_run recipe.yaml >/dev/null; echo $?'
    recipe = tmp_path / "recipe.yaml"
    recipe.touch()
    for job, kept in (("7", False), ("7", True), ("99", False)):
        (tmp_path / "slurm").mkdir(exist_ok=True)
        excluded.write_text("n2\n")
        done = shell(tmp_path, f"cd {tmp_path}; {script}", SLURM_JOB_ID=job)
        assert done.stdout == "0\n", done.stderr
        assert excluded.exists() is kept


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("slurm 20.11.9", 0),
        ("slurm-wlm 22.05.8", 0),
        ("slurm 24.11.0-1", 0),
        ("slurm 20.02.7", 2),
        ("slurm 19.05.5", 2),
        ("a version of its own", 0),
    ],
)
def test_the_least_version(tmp_path, said, code):
    done = shell(tmp_path, f"srun() {{ echo '{said}'; }}; check_slurm")
    assert done.returncode == code
    assert not code or f"error: SLURM {said.split()[1]} is too old: the templates need 20.11 or newer." in done.stderr
    assert done.stderr.count("\n") == (1 if code else 0)


def test_ports_of_jobs_that_may_share_a_node_differ(tmp_path):
    """Jobs in a row, each with its first restarts."""
    script = """
        for job in $(seq 100 160); do for restart in 0 1 2 3; do
            SLURM_JOB_ID=$job RESTARTS=$restart job_port
        done; done
    """
    ports = [int(line) for line in shell(tmp_path, script).stdout.split()]
    assert len(ports) == 61 * 4 == len(set(ports)) and min(ports) >= 10000 and max(ports) < 30000


def test_a_port_in_use_is_passed_over(tmp_path):
    for port in range(10000, 10050):
        try:
            server = socket.create_server(("127.0.0.1", port))
        except OSError:
            continue
        with server:
            free = int(shell(tmp_path, f"SLURM_JOB_ID={port - 10000}; job_port").stdout)
        assert free != port and int(shell(tmp_path, f"SLURM_JOB_ID={port - 10000}; job_port").stdout) == port
        return


def test_a_health_check_may_use_functions_and_variables_of_its_profile(tmp_path):
    site = f"""
        SITE_SCRATCH="{tmp_path}/it's scratch"; SITE_LEAST="3 free"
        enough() {{ [ "$SITE_LEAST" = "3 free" ]; }}
        site_health_check() {{ enough; }}
    """
    script = """
        SLURM_JOB_NODELIST=n1 GPUS=0
        scontrol() { echo n1; }
        timeout() { shift; "$@"; }
        srun() { while [[ $1 == --* ]]; do shift; done; SLURMD_NODENAME=n1 "$@"; }
        mkdir -p "$STATE/health"
        check_nodes; echo $?
    """
    done = shell(tmp_path, script, site, SLURM_JOB_NUM_NODES="1")
    assert done.stdout == "0\n", (done.stdout, done.stderr)
    assert (tmp_path / "slurm" / "health" / "1.n1").read_text() == "ok\n"


# Arrays that are never empty where they are expanded.
FULL = {"BAD_NODES", "launch", "words", "SRUN_CONTAINER", "multi_gpu.sh:options"}
NEWER = (
    r"wait -n|local -n|declare -n|mapfile -d|\$\{\w+@[A-Za-z]\}|\$EPOCH|BASH_ARGV0|inherit_errexit|shopt -s \w*patsub"
)


@pytest.mark.parametrize(
    "path",
    [*sorted(LIBRARY.parent.glob("*.s*")), *sorted((LIBRARY.parents[1] / "launch").glob("*.sh"))],
    ids=lambda path: path.name,
)
def test_scripts_run_on_bash_4_2(path):
    """Nothing that came later, and no expansion of an empty array: before 4.4 that is an unbound variable (set -u)."""
    text = path.read_text()
    assert not re.findall(NEWER, text)
    unguarded = set(re.findall(r'(?<!\+)"\$\{(\w+)\[@\]\}"', text))
    assert all(name in FULL or f"{path.name}:{name}" in FULL for name in unguarded)
