"""`orpo-dist train` in processes of its own: torchrun, accelerate launch, a model from the hub's cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.pair_files import write_pairs

REPOSITORY = Path(__file__).resolve().parents[1]
REVISION = "a" * 40
LAUNCHERS = {
    "one": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.jsonl", 10, seed=1)
    write_pairs(folder / "test.jsonl", 5, seed=2)
    return folder


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory, tiny_llama, chat_tokenizer) -> Path:
    """A hub cache as `hf download owner/tiny` leaves it."""
    cache = tmp_path_factory.mktemp("hub")
    snapshot = cache / "models--owner--tiny" / "snapshots" / REVISION
    tiny_llama(len(chat_tokenizer)).save_pretrained(snapshot)
    chat_tokenizer.save_pretrained(snapshot)
    refs = cache / "models--owner--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(REVISION)
    return cache


@pytest.fixture
def start(tmp_path, pairs, hub_cache):
    """Run the command line in new processes; returns what ended."""

    def run(name: str, launcher: list[str], **changes) -> subprocess.CompletedProcess:
        recipe = {
            "model_name_or_path": "owner/tiny",
            "dataset_name": str(pairs),
            "dataset_test_split": "test",
            "output_dir": str(tmp_path / name),
            "optim": "sgd",
            "learning_rate": 0.1,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "env": {"HF_HUB_CACHE": str(hub_cache)},
            **changes,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
        command = [*launcher, "-m", "orpo_dist.cli", "train", str(path)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)

    return run


def finished(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.mark.topology
def test_two_processes_equal_one(start, tmp_path):
    finished(start("one", LAUNCHERS["one"], per_device_train_batch_size=4))
    said = finished(start("two", LAUNCHERS["torchrun"], per_device_train_batch_size=2))
    assert said.count("reports: ") == 1 and said.count("pairs kept") == 2  # the main process alone prints
    one, two = (json.loads((tmp_path / name / "run_summary.json").read_text()) for name in ("one", "two"))
    assert (two["world_size"], two["global_batch_size"], two["steps"], one["steps"]) == (2, 4, 6, 6)
    assert len(two["peak_memory_gib"]) == 2
    assert two["eval_before"] == pytest.approx(one["eval_before"], rel=1e-5, abs=1e-6)
    assert two["eval_after"] == pytest.approx(one["eval_after"], rel=1e-4, abs=1e-6)
    of_one, of_two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in of_one.items():
        torch.testing.assert_close(of_two[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.topology
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_evaluations_samples_and_adapter_under_deepspeed(start, tmp_path, config):
    pytest.importorskip("deepspeed")
    settings = yaml.safe_load((REPOSITORY / "accelerate_configs" / f"{config}.yaml").read_text())
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump({**settings, "use_cpu": True, "num_processes": 2}))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={path}", "--main_process_port=0"]
    changes = {"use_peft": True, "generate_during_eval": True, "max_completion_length": 6, "optim": "adamw_torch"}
    finished(start("run", launcher, per_device_train_batch_size=2, learning_rate=1e-2, **changes))
    summary = json.loads((tmp_path / "run" / "run_summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["eval_after"]["nll_loss"] < summary["eval_before"]["nll_loss"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 4 + [6] * 4
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.numel() for tensor in adapter.values())


def test_a_hub_model_is_recorded_by_its_name(start, tmp_path):
    finished(start("run", LAUNCHERS["one"], use_peft=True, max_steps=1, learning_rate=1e-3))
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/tiny", REVISION)
    header = yaml.safe_load((tmp_path / "run" / "README.md").read_text().split("---")[1])
    assert (header["base_model"], header["base_model_relation"]) == ("owner/tiny", "adapter")
    assert json.loads((tmp_path / "run" / "run_summary.json").read_text())["model_revision"] == REVISION
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["model_name_or_path"] == "owner/tiny"


@pytest.mark.topology
def test_bad_input_ends_every_process(start, tmp_path, pairs):
    broken = tmp_path / "broken"
    shutil.copytree(pairs, broken)
    (broken / "train.jsonl").write_text('{"prompt": "a", "chosen": "b"\n')
    done = start("run", LAUNCHERS["torchrun"], dataset_name=str(broken))
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("orpo-dist: error")]
    assert len(told) == 1 and "train.jsonl" in told[0]
    assert "exitcode  : 2" in done.stderr
