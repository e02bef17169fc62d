"""`submit`, `status` and `cancel` on a machine without SLURM: what is checked there, and what a dry run prints."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from orpo_dist.cli import main
from orpo_dist.cluster.slurm import PartitionNodes, _gpus_of, check_version, partition_nodes
from orpo_dist.errors import UserError

RECIPE = "model_name_or_path: owner/tiny\ndataset_name: pairs.jsonl\nlearning_rate: 1e-5\nbf16: true\n"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project folder on a file system that the site calls shared, and no SLURM in sight."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    site = tmp_path / "site.sh"
    site.write_text(f'SITE_SHARED_FOLDERS="{tmp_path}"\nSITE_GPU_REQUEST="--gres=gpu:%d"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORPO_DIST_SITE", str(site))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def dry_run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["submit", "recipe.yaml", "--dry-run", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_dry_run_prints_the_script_and_writes_nothing(project, capsys):
    code, script, notes = dry_run(capsys, "--nodes", "2", "--gpus-per-node", "4", "--time", "2:00:00", "--beta", "0.2")
    assert code == 0
    for line in ("--job-name=orpo-recipe", "--nodes=2", "--gres=gpu:4", "--time=2:00:00", "--signal=B:USR1@600"):
        assert f"#SBATCH {line}\n" in script
    run = project / "runs" / "recipe"
    assert script.endswith(f"\ntrain {run}/slurm/recipe.yaml --beta 0.2 --output_dir {run}\n")
    assert "owner/tiny is not in the cache of this node" in notes and "--prefetch" in notes
    assert not run.exists()
    _, script, _ = dry_run(capsys, "--output_dir", "here", "--beta", "0.2")
    assert script.endswith(f"\ntrain {project}/here/slurm/recipe.yaml --beta 0.2 --output_dir {project}/here\n")


def test_dry_run_of_a_prefetch_pair(project, capsys):
    code, scripts, notes = dry_run(capsys, "--prefetch", "--chain", "3")
    assert code == 0 and notes == ""
    first, second = scripts.split("#!/usr/bin/env bash\n")[1:]
    assert "#SBATCH --job-name=orpo-recipe-prefetch\n" in first and "gres" not in first.split("\n\n")[0]
    assert "#SBATCH --no-requeue\n" in second and "\nCHAIN=" in second


def test_dry_run_of_a_sweep(project, capsys):
    (project / "sweep.txt").write_text("# rates\n--learning_rate 1e-5\n\n--learning_rate 1e-6 --run_name 'a b'\n")
    code, script, _ = dry_run(capsys, "--sweep", "sweep.txt")
    assert code == 0 and "#SBATCH --array=0-1\n" in script
    assert f"\nsweep {project}/runs/recipe/slurm/recipe.yaml {project}/sweep.txt --output_dir" in script


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--beta", "high"], "--beta: 'high' is not a number."),
        (["--bete", "0.2"], "Unknown option --bete"),
        (["--sweep", "none.txt"], "--sweep none.txt does not exist"),
        (["--sweep", "empty.txt"], "--sweep empty.txt contains no flags"),
        (["--sweep", "folder.txt"], "a line must contain flags, and not --output_dir"),
        (["--sweep", "two.txt", "--array", "0-2"], "--array 0-2: the runs of the sweep are 0 to 1"),
        (["--sweep", "two.txt", "--chain", "2"], "--chain needs a single run"),
        (["--output_dir", "/elsewhere/run"], "output_dir /elsewhere/run is in none of the shared folders"),
        (["--model_name_or_path", "./none"], "model_name_or_path: ./none does not exist"),
        (["--accelerate-config", "zero4"], "Unknown accelerate config 'zero4'"),
        (["--sbatch", "mail"], "'mail' is not of the form --option or --option=value"),
        (["--sbatch=--export=ALL,HF_TOKEN=planted"], "its value would be readable in the job script"),
        (["--sbatch=--comment x\n#SBATCH --uid=0"], "is not of the form --option or --option=value"),
        (["--sbatch=--comment=x\n#SBATCH --uid=0"], "cannot contain a line break"),
        (["--nodes", "two"], "orpo-dist submit: argument --nodes: invalid int value: 'two'"),
    ],
)
def test_refused(project, capsys, arguments, said):
    (project / "empty.txt").write_text("# nothing\n")
    (project / "folder.txt").write_text("--output_dir elsewhere\n")
    (project / "two.txt").write_text("--beta 0.1\n--beta 0.2\n")
    code, _, told = dry_run(capsys, *arguments)
    assert code == 2 and said in told


def test_a_push_needs_a_job_with_a_network(project, capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    code, _, told = dry_run(capsys, "--push_to_hub", "true")
    assert code == 2 and "jobs train with HF_HUB_OFFLINE=1" in told
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert dry_run(capsys, "--push_to_hub", "true")[0] == 0
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with (project / "site.sh").open("a") as file:
        file.write("site_setup() { export HF_HUB_OFFLINE=0; }\n")
    assert dry_run(capsys, "--push_to_hub", "true")[0] == 0


def test_checkpoints_that_no_job_can_go_on_from_are_warned_of(project, capsys):
    code, _, told = dry_run(capsys, "--save_only_model", "true")
    assert code == 0 and "save_only_model: a job that is requeued cannot go on" in told


def test_a_finished_run_is_not_submitted_again(project, capsys):
    state = project / "runs" / "recipe" / "slurm"
    state.mkdir(parents=True)
    (state / "done").touch()
    code, _, told = dry_run(capsys)
    assert code == 2 and "is already finished" in told


SBATCH = """#!/bin/sh
env >"$PWD/environment.txt"
echo 812
"""


@pytest.fixture
def commands(project, monkeypatch) -> None:
    """SLURM's commands, replaced: they answer, and keep the environment of the submission."""
    folder = project / "commands"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": "#!/bin/sh\n", "sinfo": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")


@pytest.mark.parametrize("extra", [[], ["--prefetch"], ["--chain", "2"]])
def test_secrets_reach_a_job_in_its_environment_and_no_file(project, commands, capsys, extra):
    (project / "recipe.yaml").write_text(
        f"# a comment\n{RECIPE}hub_token: planted-one\nmodel_init_kwargs:\n  token: planted-two\n  a: 1\n"
        "env:\n  WANDB_API_KEY: planted-three\n  NCCL_DEBUG: INFO\n"
    )
    code = main(["submit", "recipe.yaml", "--hub_token", "planted-four", "--beta", "0.2", *extra])
    said = capsys.readouterr()
    assert code == 0 and "are in no file of the job" in said.err and "planted" not in said.out + said.err
    run = project / "runs" / "recipe"
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if b"planted" in path.read_bytes()]
    copied = run / "slurm" / "recipe.yaml"
    assert yaml.safe_load(copied.read_text()) == {
        "env": {"NCCL_DEBUG": "INFO"},
        "model_name_or_path": "owner/tiny",
        "dataset_name": "pairs.jsonl",
        "learning_rate": "1e-5",
        "bf16": True,
        "model_init_kwargs": {"a": 1},
    }
    assert copied.stat().st_mode & 0o777 == 0o600
    assert (run / "slurm" / "job.sbatch").stat().st_mode & 0o777 == 0o700
    environment = dict(
        line.split("=", 1) for line in (project / "environment.txt").read_text().splitlines() if "=" in line
    )
    assert environment["WANDB_API_KEY"] == "planted-three"
    flags = ["--hub_token", "planted-one", "--model_init_kwargs", '{"token": "planted-two", "a": 1}']
    assert json.loads(environment["ORPO_DIST_PRIVATE_FLAGS"]) == [*flags, "--hub_token", "planted-four"]


def test_a_recipe_without_secrets_is_copied_as_it_is(project, commands, capsys):
    assert main(["submit", "recipe.yaml"]) == 0
    assert (project / "runs" / "recipe" / "slurm" / "recipe.yaml").read_text() == RECIPE
    assert "no file of the job" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [["submit", "recipe.yaml"], ["status"], ["cancel", "17"]])
def test_without_slurm(project, capsys, monkeypatch, command):
    (project / "bin").mkdir()
    (project / "bin" / "bash").symlink_to(str(shutil.which("bash")))
    monkeypatch.setenv("PATH", str(project / "bin"))
    assert main(command) == 2
    assert "run this on a login node of a SLURM cluster" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gres", "count"), [("(null)", 0), ("gpu:8", 8), ("gpu:a100:4(S:0-1)", 4), ("tmp:1,gpu:h100:2,gpu:l4:1", 3)]
)
def test_gpus_of_a_node(gres, count):
    assert _gpus_of(gres) == count


def test_partitions(tmp_path, monkeypatch):
    (tmp_path / "sinfo").write_text(
        "#!/bin/sh\nprintf 'cpu*|4|64|(null)|infinite\\ngpu|2|96+|gpu:a100:8|1-00:00:00\\n'\n"
    )
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert partition_nodes(None) == [PartitionNodes(4, 64, 0, "infinite")]
    assert partition_nodes("gpu") == [PartitionNodes(2, 96, 8, "1-00:00:00")]


@pytest.mark.parametrize(
    ("said", "refused"),
    [("slurm 20.02.7", True), ("slurm-wlm 22.05.8", False), ("slurm 20.11.0-0rc1", False), ("unknown", False)],
)
def test_the_least_slurm(tmp_path, monkeypatch, said, refused):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\necho {said}\n")
    (tmp_path / "sbatch").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if refused:
        with pytest.raises(UserError, match=r"slurm 20\.02\.7 is too old: the templates need SLURM 20\.11 or newer\."):
            check_version()
    else:
        check_version()
