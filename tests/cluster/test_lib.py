"""Functions of slurm/lib.sh, by themselves."""

import subprocess
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[2] / "slurm" / "lib.sh"


def shell(folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess:
    state = folder / "slurm"
    (state / "exit").mkdir(parents=True, exist_ok=True)
    text = f"""
        SITE_MAX_RESTARTS=20 SITE_SHARED_FOLDERS= SITE_LOCAL_FOLDERS=
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
