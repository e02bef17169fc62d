"""A DeepSpeed config against the run's: before any data. Loading its checkpoints is tested in tests/survival."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from orpo_dist import ORPOConfig
from transformers.integrations.deepspeed import deepspeed_config

given = {"deepspeed": sys.argv[1]} if len(sys.argv) > 1 else {}
args = ORPOConfig("out", use_cpu=True, report_to="none", per_device_train_batch_size=2, **given)
print("STAGE", deepspeed_config()["zero_optimization"]["stage"], args.per_device_train_batch_size)
"""


@pytest.fixture(params=["argument", "accelerate"])
def made(request, tmp_path):
    """What making an ORPOConfig says, with a DeepSpeed config from either place."""
    pytest.importorskip("deepspeed")

    def make(**changes) -> subprocess.CompletedProcess:
        path = tmp_path / "ds.json"
        settings = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        path.write_text(json.dumps({**settings, "zero_optimization": {"stage": 2}, **changes}))
        command, variables = [sys.executable, "-c", PROGRAM], {"DS_ACCELERATOR": "cpu"}
        if request.param == "argument":
            command.append(str(path))
        else:
            variables |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
        environment = {**os.environ, **variables}
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=180)

    return make


def test_a_contradiction_is_named_with_both_sides(made):
    told = made(train_micro_batch_size_per_gpu=4, gradient_clipping=2.0).stderr.strip().splitlines()[-1]
    assert (
        told.startswith("orpo_dist.errors.UserError: The DeepSpeed config ") and "ds.json contradicts the run" in told
    )
    assert "train_micro_batch_size_per_gpu=4 against per_device_train_batch_size=2" in told
    assert "gradient_clipping=2.0 against max_grad_norm=1.0" in told


def test_what_agrees_is_left_in_force_and_its_optimizer_is_named(made):
    done = made(gradient_clipping=1.0, optimizer={"type": "AdamW", "params": {"lr": "auto"}})
    assert "STAGE 2 2" in done.stdout, done.stderr
    assert "has no effect: the DeepSpeed config has its own optimizer, AdamW" in done.stderr


def test_a_config_that_cannot_be_read_is_not_in_force_afterwards(tmp_path):
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from orpo_dist import ORPOConfig

    with pytest.raises(ValueError) as caught:  # which keeps the broken object alive
        ORPOConfig(str(tmp_path), use_cpu=True, report_to="none", deepspeed=str(tmp_path / "missing.json"))
    assert "missing.json" in str(caught.value)
    assert not is_deepspeed_zero3_enabled()
