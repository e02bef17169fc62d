"""A checkpoint is data: loading it runs no code that somebody put there. Secrets are in nothing that a run leaves."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from benchmarks.kill_campaign import REPOSITORY, START_SECONDS, make_inputs, newest, recipe
from orpo_dist import ORPOTrainer
from orpo_dist.distributed.zero import safe_pickles
from tests.trainer_runs import config


class Attack:
    def __reduce__(self):
        return print, ("code of the checkpoint has run",)


@pytest.fixture
def poisoned(tmp_path):
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Attack()}, path)
    return path


def test_a_poisoned_partition_is_refused_where_deepspeed_would_load_it(poisoned, capsys):
    deepspeed = pytest.importorskip("deepspeed")
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    engine = TorchCheckpointEngine()
    engine.load(str(poisoned))
    assert "code of the checkpoint has run" in capsys.readouterr().out  # what DeepSpeed alone does
    with safe_pickles(), pytest.raises(pickle.UnpicklingError):
        engine.load(str(poisoned))
    assert "code of the checkpoint has run" not in capsys.readouterr().out
    assert deepspeed.__version__


def test_what_deepspeed_saves_loads(tmp_path):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    path = tmp_path / "states.pt"
    torch.save({"loss_scaler": LossScaler(1.0), "zero_stage": ZeroStageEnum.gradients, "step": torch.ones(())}, path)
    with safe_pickles():
        assert torch.load(path, weights_only=False)["zero_stage"] == 2


RECIPE, FLAG, VARIABLE, PYTHON = (f"planted-token-{word}" for word in ("one", "two", "three", "four"))
PLANTED = (RECIPE, FLAG, VARIABLE, PYTHON)


def holding(folder: Path) -> list[str]:
    """The files below that hold a planted token."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and any(token.encode() in path.read_bytes() for token in PLANTED)
    ]


def command_lines(process: psutil.Process) -> list[str]:
    return [" ".join(one.cmdline()) for one in [process, *process.children(recursive=True)]]


@pytest.mark.topology
@pytest.mark.parametrize("launcher", ["train", "launch"])
def test_planted_tokens_are_in_no_file_log_or_process_list(tmp_path, launcher):
    make_inputs(tmp_path)
    output = tmp_path / "run"
    path = tmp_path / "recipe.yaml"
    topology = "ddp" if launcher == "launch" else "plain"
    path.write_text(
        yaml.safe_dump(
            recipe(tmp_path, output, topology)
            | {"hub_token": RECIPE, "env": {"WANDB_API_KEY": RECIPE, "MIRROR": f"https://me:{RECIPE}@host"}}
            | {"model_init_kwargs": {"token": RECIPE}, "report_to": "tensorboard", "save_steps": 5, "max_steps": 20}
        )
    )
    how = ["--cpu", "--processes-per-node", "2", "--accelerate-config", "ddp"] if launcher == "launch" else []
    command = [sys.executable, "-m", "orpo_dist.cli", launcher, *how, str(path), "--hub_token", FLAG, "--beta", "0.2"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HF_TOKEN": VARIABLE,
        "ORPO_DIST_CACHE": str(tmp_path / "cache"),
    }
    with (tmp_path / "said.txt").open("w") as said:
        run = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        deadline, seen = time.monotonic() + START_SECONDS, []
        while run.poll() is None and time.monotonic() < deadline:
            if newest(output):
                seen = seen or command_lines(psutil.Process(run.pid))
            time.sleep(0.05)
    told = (tmp_path / "said.txt").read_text()
    assert run.wait() == 0, told[-3000:]
    assert seen and not [line for line in seen if any(token in line for token in PLANTED)], seen
    assert all("--beta 0.2" in line for line in seen if str(path) in line)
    assert not [token for token in PLANTED if token in told]
    path.unlink()
    assert holding(tmp_path) == []


def test_planted_tokens_of_a_python_run_are_in_no_file(tmp_path, tiny_llama, chat_tokenizer):
    folder = tmp_path / "model"
    tiny_llama(len(chat_tokenizer)).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    args = config(
        tmp_path / "run",
        hub_token=PYTHON,
        model_init_kwargs={"token": PYTHON, "config": None},
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer = ORPOTrainer(str(folder), args, train_dataset=[row] * 4)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == args.hub_token == PYTHON  # still there for a push
    assert PYTHON not in trainer.args.to_json_string()  # which trackers write down
    assert (tmp_path / "run" / "training_args.bin").is_file()
    assert holding(tmp_path) == []
