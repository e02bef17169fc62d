"""`orpo-dist launch`: the command of a node, and what is refused before anything is started."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from orpo_dist.cli import main
from orpo_dist.cluster.files import accelerate_config
from orpo_dist.cluster.launch import _max_restarts, choose_config, fitted_config
from orpo_dist.cluster.processes import Placement, launcher_command, telling_code
from orpo_dist.errors import UserError
from orpo_dist.recipe.preview import preview

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("model_name_or_path: tiny\ndataset_name: pairs.jsonl\nlearning_rate: 1e-5\n")
    return path


@pytest.mark.parametrize(
    ("flags", "world_size", "config"),
    [([], 1, "single"), ([], 8, "zero2"), (["--use_peft"], 8, "ddp"), (["--load_in_4bit", "true"], 16, "ddp")],
)
def test_the_config_follows_the_recipe(recipe, flags, world_size, config):
    pytest.importorskip("deepspeed")
    assert choose_config(preview(recipe, flags), world_size) == config


def test_commands():
    config, accelerate = Path("zero3.yaml"), "-m accelerate.commands.launch --config_file zero3.yaml"
    alone = launcher_command("zero3", config, Placement(processes=8), "r.yaml", ["--beta", "0.2"])
    assert shlex.join(alone[1:]) == (
        f"{accelerate} --num_machines 1 --num_processes 8 --main_process_port 0 "
        "--module orpo_dist.cli train r.yaml --beta 0.2"
    )
    second = launcher_command("zero3", config, Placement(2, 1, "n1", 12345, 8), "r.yaml", [])
    assert shlex.join(second[1:]) == (
        f"{accelerate} --num_machines 2 --num_processes 16 --machine_rank 1 --main_process_ip n1 "
        "--main_process_port 12345 --module orpo_dist.cli train r.yaml"
    )
    on_cpu = launcher_command("ddp", config, Placement(2, 1, "n1", 12345, 2), "r.yaml", [], cpu=True)
    assert shlex.join(on_cpu[1:]) == (
        "-m torch.distributed.run --nnodes=2 --nproc_per_node=2 --node_rank=1 --master_addr=n1 --master_port=12345 "
        "-m orpo_dist.cli train r.yaml"
    )


def test_configs_are_fitted_to_the_nodes(tmp_path):
    placement = Placement(4, 1, "n1", 12345, 2)
    assert fitted_config(accelerate_config("zero3"), placement, tmp_path) == accelerate_config("zero3")
    on_cpu = yaml.safe_load(fitted_config(accelerate_config("zero3"), placement, tmp_path, cpu=True).read_text())
    assert on_cpu == yaml.safe_load(accelerate_config("zero3").read_text()) | {"use_cpu": True}
    hsdp = yaml.safe_load(fitted_config(accelerate_config("fsdp2_hsdp"), placement, tmp_path).read_text())
    assert hsdp["parallelism_config"] == {
        "parallelism_config_dp_replicate_size": 4,
        "parallelism_config_dp_shard_size": 2,
    }
    hpz = yaml.safe_load(fitted_config(accelerate_config("zero3_hpz"), placement, tmp_path).read_text())
    deepspeed = json.loads(Path(hpz["deepspeed_config"]["deepspeed_config_file"]).read_text())
    assert deepspeed["zero_optimization"]["zero_hpz_partition_size"] == 2


DEEPSPEED = "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: ds.json\n"


@pytest.mark.parametrize(
    ("config", "deepspeed", "said"),
    [
        ("a: [", "{}", r"own.yaml cannot be read: while parsing"),
        ("- a\n- b\n", "{}", "own.yaml holds no settings"),
        (DEEPSPEED, None, "ds.json cannot be read: No such file"),
        (DEEPSPEED, '{"a": 1,}', "ds.json cannot be read: Expecting property name"),
        (DEEPSPEED, "[" * 100000, "ds.json cannot be read: nested too deeply"),
        (DEEPSPEED, "[1]", "ds.json holds no settings"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, config, deepspeed, said):
    (tmp_path / "own.yaml").write_text(config)
    if deepspeed is not None:
        (tmp_path / "ds.json").write_text(deepspeed)
    with pytest.raises(UserError, match=said) as refused:
        fitted_config(tmp_path / "own.yaml", Placement(), tmp_path / "out")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", sorted(accelerate_config("ddp").parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_names_its_nodes_launcher(path):
    """pdsh, DeepSpeed's default, would start the other nodes a second time."""
    settings = yaml.safe_load(path.read_text())
    if settings["distributed_type"] == "DEEPSPEED":
        assert settings["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
    assert settings["rdzv_backend"] == "static" and settings["main_training_function"] == "main"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "2", "--node-rank", "2", "--head-address", "n1"], "the node ranks of N nodes are 0 to N - 1"),
        (["--nodes", "2"], "--head-address is missing"),
        (["--processes-per-node", "64"], "64 processes are requested"),
        (["--cpu", "--processes-per-node", "2", "--accelerate-config", "zero9"], "Unknown accelerate config 'zero9'"),
        (["--cpu", "--accelerate-config", "mine.yaml"], "mine.yaml does not exist"),
        (["--port", "99999", "--nodes", "2", "--head-address", "n1"], "ports are 1 to 65535"),
        (["--frobnicate"], "Options of launch come before the recipe"),
    ],
)
def test_refused_before_anything_starts(recipe, capsys, arguments, said):
    assert main(["launch", *arguments, str(recipe)]) == 2
    assert said in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_made(recipe, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "cache"))
    where = ["--nodes", "2", "--head-address", "n1", "--cpu", "--accelerate-config", "ddp"]
    assert main(["launch", *where, str(recipe), "--output_dir", str(recipe / "run")]) == 2
    assert f"Cannot make the run's folder {recipe / 'run'}: Not a directory." in capsys.readouterr().err


def test_several_nodes_without_gpus_must_say_cpu(recipe, capsys):
    if torch.cuda.device_count():
        pytest.skip("this machine has GPUs")
    assert main(["launch", "--nodes", "2", "--head-address", "n1", str(recipe)]) == 2
    assert "has no visible GPU. To train on the CPU, pass --cpu" in capsys.readouterr().err


def test_dry_run_prints_the_command(recipe, capsys):
    arguments = ["launch", "--dry-run", "--cpu", "--processes-per-node", "2", "--accelerate-config", "fsdp2"]
    assert main([*arguments, str(recipe), "--beta", "0.2"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "fsdp2.yaml --num_machines 1 --num_processes 2" in said
    assert said.rstrip().endswith(f"train {recipe} --beta 0.2 --use_cpu true")


def test_a_dry_run_hides_variables_of_ranks_and_secrets(recipe, capsys, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "1")
    monkeypatch.setenv("PMI_RANK", "0")
    assert main(["launch", "--dry-run", "--cpu", str(recipe), "--hub_token", "hf_abcdefghijkl", "--beta", "0.2"]) == 0
    said = capsys.readouterr()
    train = f"{shlex.quote(sys.executable)} -m orpo_dist.cli train {recipe} --beta 0.2 --use_cpu true\n"
    assert said.out == f"env -u PMI_RANK -u PMI_SIZE {train}"
    assert "without the secrets in --hub_token" in said.err and "hf_abc" not in said.err


MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}


def run_script(recipe, name="multi_node", **variables):
    done = subprocess.run(
        [REPOSITORY / "launch" / f"{name}.sh", "--cpu", "--dry-run", recipe],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_script_under_the_variables_of_schedulers(recipe, tmp_path):
    cache = {"ORPO_DIST_CACHE": str(tmp_path / "cache"), "CONFIG": "ddp"}
    code, printed, said = run_script(recipe, **cache, **MPI, MASTER_ADDR="n1", MASTER_PORT="12345")
    assert code == 0, said
    assert "--nnodes=2 --nproc_per_node=1 --node_rank=1 --master_addr=n1 --master_port=12345" in printed
    assert "node 1 of 2, head n1:12345 (from OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK, MASTER_ADDR" in said
    code, printed, said = run_script(recipe, **cache, **MPI, NODES="3", NODE_RANK="2", HEAD="n7", PORT="7", NNODES="9")
    assert code == 0 and "--nnodes=3 --nproc_per_node=1 --node_rank=2 --master_addr=n7 --master_port=7" in printed
    code, printed, said = run_script(recipe, **cache, **MPI, NNODES="3", MASTER_ADDR="n1")
    assert (code, printed) == (2, "") and said.count("\n") == 1
    assert "NNODES says 3 nodes, and OMPI_COMM_WORLD_SIZE says 2" in said
    code, printed, said = run_script(recipe, **cache, **MPI)
    assert code == 2 and "--head-address is missing" in said


@pytest.mark.parametrize("name", ["single_gpu", "multi_gpu"])
def test_scripts_for_one_machine_mean_this_machine(recipe, tmp_path, name):
    """Also in a job of several nodes."""
    code, printed, said = run_script(recipe, name, ORPO_DIST_CACHE=str(tmp_path), LSB_HOSTS="n1 n2", NNODES="3")
    assert code == 0, said
    assert printed == f"{shlex.quote(sys.executable)} -m orpo_dist.cli train {recipe} --use_cpu true\n"


def test_restarts_of_a_pytorchjob(monkeypatch):
    monkeypatch.setenv("PET_MAX_RESTARTS", "3")
    assert _max_restarts(None) == 3 and _max_restarts(0) == 0
    monkeypatch.delenv("PET_MAX_RESTARTS")
    assert _max_restarts(None) == 0
    with pytest.raises(UserError, match="--max-restarts -1"):
        _max_restarts(-1)


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([1, 2, -signal.SIGTERM], 2),
        ([75, 3], 3),
        ([75, -signal.SIGTERM, 75], 75),
        ([75, -signal.SIGKILL], 137),
        ([75, 1, 75], 1),
        ([1, -signal.SIGTERM], 1),
        ([-signal.SIGTERM, -signal.SIGKILL], 137),
        ([-signal.SIGTERM], 143),
    ],
)
def test_of_several_exit_codes_the_telling_one(codes, code):
    assert telling_code(codes) == code
