"""Ranks that share a packed row train like one process: the same losses, metrics, gradient norms and final weights."""

import json
import os
import subprocess
import sys

import pytest

from tests.launching.launch import REPOSITORY
from tests.topologies.runs import CONFIG, LORA, assert_same, run

SLICED = {**CONFIG, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "sequence_parallel_size": 2}
OVER_FOUR = {**SLICED, "per_device_train_batch_size": 2}
GENTLE_SLICED = {**SLICED, "learning_rate": 0.02}
TEXT = ["llama", "gemma2", "gpt_oss", "qwen3_moe", "qwen3_5", "bamba", "lfm2", "jamba"]
VISION = ["qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"]
MORE_TEXT = ["qwen2", "qwen3", "mistral", "gemma3", "phi3", "olmo2", "cohere2", "granite_hybrid", "gpt2", "stablelm"]
MORE_VISION = ["qwen2_vl", "qwen3_5", "llava", "llava_next", "llava_onevision", "idefics3", "smolvlm", "internvl",
               "mistral3"]  # fmt: skip


@pytest.fixture(scope="module")
def reference(setting):
    return run(setting, "one", CONFIG)


@pytest.mark.topology
@pytest.mark.parametrize("launcher", ["torchrun", "zero3"])
def test_two_ranks_share_a_row(setting, reference, launcher):
    outcome = run(setting, f"sliced_{launcher}", SLICED, launcher)
    assert_same(outcome, reference)


@pytest.mark.topology
def test_two_groups_of_two_with_fsdp2(setting, reference):
    outcome = run(setting, "sliced_fsdp2", OVER_FOUR, "fsdp2", processes=4)
    assert_same(outcome, reference, world_size=4)


@pytest.mark.topology
def test_lora(setting, lora_reference):
    outcome = run(setting, "sliced_lora", GENTLE_SLICED, "zero2", lora=LORA)
    assert_same(outcome, lora_reference)


@pytest.mark.topology
def test_a_run_goes_on_with_rows_that_are_whole(setting, reference):
    """Steps 1 to 4 with two ranks per row, the rest with a row per rank: the same pairs, the same weights."""
    saving = {**SLICED, "save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    run(setting, "sliced_first", saving, "torchrun")
    checkpoint = str(setting["folder"] / "sliced_first.run" / "checkpoint-4")
    whole = {**SLICED, "sequence_parallel_size": 1, "per_device_train_batch_size": 2}
    outcome = run(setting, "whole_then", whole, "torchrun", resume=checkpoint)
    ours, theirs = (
        {line["step"]: line["loss"] for line in result.log if "loss" in line} for result in (outcome, reference)
    )
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 8
    for name, weight in reference.weights.items():
        assert (outcome.weights[name] - weight).abs().max() <= 1e-5 * weight.abs().max() + 1e-8, name


def errors(tmp_path, text, vision, ranks, checks=()):
    settings, out = tmp_path / "settings.json", tmp_path / "errors.json"
    settings.write_text(json.dumps({"text": text, "vision": vision, "checks": checks}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launch, "-m", "tests.launching.slices_worker", str(settings), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(out.read_text())


@pytest.mark.topology
def test_families_on_two_ranks(tmp_path):
    found = errors(tmp_path, TEXT, VISION, 2, checks=["llama", "gpt_oss", "gemma2"])
    said = {name: found.pop(name) for name in [*found] if name.startswith("check of")}
    assert {name for name, reason in said.items() if not reason} == {name for name in said if name.endswith(": ")}
    assert len(said) == 12 and all("in slices its hidden states differ" in reason for reason in said.values() if reason)
    assert {name.split(",")[0] for name in found} == {*TEXT, *VISION}
    assert {name: error for name, error in found.items() if error[0] > 1e-5} == {}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("text", "vision", "ranks"), [(TEXT, VISION, 3), (MORE_TEXT, MORE_VISION, 2)])
def test_more_families(tmp_path, text, vision, ranks):
    found = errors(tmp_path, text, vision, ranks)
    assert {name: error for name, error in found.items() if error[0] > 1e-5} == {}
