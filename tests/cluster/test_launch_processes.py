"""`orpo-dist launch` with real processes: its exit codes are theirs, and a signal to it reaches them."""

import signal
import subprocess
import sys

import pytest

from tests.cluster.workplace import SECONDS, until

pytestmark = pytest.mark.topology


def start(workplace, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "orpo_dist.cli", "launch", "--cpu", "--processes-per-node", "2"]
    return subprocess.Popen(
        [*command, *arguments],
        env=workplace.environment,
        cwd=workplace.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_a_signal_to_the_launcher_stops_the_run(workplace, config):
    folder = workplace.folder / f"signalled_{config}"
    flags = ["--num_train_epochs", "2000", "--save_strategy", "no", "--output_dir", str(folder)]
    run = start(workplace, "--accelerate-config", config, str(workplace.recipe), "--optim", "adamw_torch", *flags)
    log = folder / "log.jsonl"
    until(lambda: run.poll() is not None or (log.exists() and log.read_text().count("\n") > 2), "the first steps")
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 75, said
    assert len(list(folder.glob("checkpoint-*/complete.json"))) == 1
    assert "Stopped at step" in said


def test_bad_input_is_2(workplace):
    (workplace.folder / "no_pairs.jsonl").write_text('{"prompt": "a", "chosen": "b"\n')
    data = ["--dataset_name", str(workplace.folder / "no_pairs.jsonl"), "--output_dir", str(workplace.folder / "bad")]
    run = start(workplace, "--accelerate-config", "ddp", str(workplace.recipe), *data)
    said, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 2, said
    assert said.count("orpo-dist: error") == 1 and "no_pairs.jsonl" in said


def test_the_line_of_a_dry_run_is_a_command(workplace):
    """Through bash, some time later and in the same environment, which here has an MPI launcher's variables: accelerate
    would read them. The config that it names is still there."""
    folder = workplace.folder / "pasted run"
    variables = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    where = ["--dry-run", "--cpu", "--processes-per-node", "2", "--accelerate-config", "fsdp2"]
    flags = ["--optim", "adamw_torch", "--max_steps", "1", "--save_strategy", "no", "--output_dir", folder]
    printed = workplace.orpo_dist("launch", *where, workplace.recipe, *flags, **variables).stdout
    assert printed.count("\n") == 1 and not folder.exists()
    workplace.run("bash", "-c", printed, **variables)
    assert (folder / "run_summary.json").is_file()
