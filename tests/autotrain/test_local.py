"""backend="local": the processes that are started, their errors, and the search for a batch that fits."""

import io
import os
import sys
from pathlib import Path

import pytest

from orpo_dist.autotrain import local as autotrain_launch
from orpo_dist.autotrain.local import (
    Attempt,
    Relay,
    TrainingFailed,
    accelerate_config,
    launch_command,
    smaller_batches,
)
from orpo_dist.autotrain.setup import set_up
from orpo_dist.errors import UserError
from tests.autotrain.options import params, recipe


@pytest.mark.parametrize(
    ("backend", "quantised", "name"),
    [
        (None, False, "ddp"),
        ("ddp", True, "ddp"),
        ("deepspeed", True, "zero2"),
        ("zero3", False, "zero3"),
        ("zero3", True, "zero3_qlora"),
    ],
)
def test_the_accelerate_config_of_a_backend(backend, quantised, name):
    path = accelerate_config(backend, quantised)
    assert path.name == f"{name}.yaml" and path.is_file()


def test_accelerate_understands_the_command():
    from accelerate.commands.launch import launch_command_parser

    command = launch_command({"bf16": True, "fp16": False}, Path("r.yaml"), accelerate_config("deepspeed"), 4)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    parsed = launch_command_parser().parse_args(command[3:])
    assert (parsed.num_processes, parsed.mixed_precision, parsed.main_process_port) == (4, "bf16", 0)
    assert (parsed.module, parsed.training_script) == (True, "orpo_dist.cli")
    assert parsed.training_script_args == ["train", "r.yaml"]


def two_gpus(monkeypatch, outcomes):
    """Two GPUs, and processes that end as told; returns the recipes they are started with."""
    started, outcomes = [], iter(outcomes)

    def start(recipe, environment, config, processes):
        started.append({**recipe, "config": config.name, "processes": processes, "environment": environment})
        return next(outcomes)

    monkeypatch.setattr(autotrain_launch, "gpu_count", lambda: 2)
    monkeypatch.setattr(autotrain_launch, "_start", start)
    return started


def test_as_many_processes_as_gpus(monkeypatch):
    started = two_gpus(monkeypatch, [Attempt(0, False)])
    autotrain_launch.run(set_up(params(token="t")), "deepspeed")
    assert (started[0]["processes"], started[0]["config"]) == (2, "zero2.yaml")
    assert started[0]["environment"] == {"HF_TOKEN": "t"}
    assert "auto_find_batch_size" not in started[0]  # the trainer searches in one process only


def test_out_of_memory_keeps_the_global_batch(monkeypatch, capsys):
    started = two_gpus(monkeypatch, [Attempt(1, True), Attempt(1, True), Attempt(0, False)])
    autotrain_launch.run(set_up(params(auto_find_batch_size=True, batch_size=6, gradient_accumulation=2)), "ddp")
    sizes = [(r["per_device_train_batch_size"], r["gradient_accumulation_steps"]) for r in started]
    assert sizes == [(6, 2), (3, 4), (1, 12)]
    assert "batch_size=3, gradient_accumulation=4 (the same global batch)" in capsys.readouterr().err


@pytest.mark.parametrize("attempt", [Attempt(1, False), Attempt(1, True)])
def test_other_failures_are_not_tried_again(attempt, monkeypatch):
    started = two_gpus(monkeypatch, [attempt])
    with pytest.raises(TrainingFailed):
        autotrain_launch.run(set_up(params(auto_find_batch_size=not attempt.out_of_memory)), None)
    assert len(started) == 1


def test_out_of_memory_with_one_pair():
    with pytest.raises(UserError, match="Out of memory with one pair per device"):
        smaller_batches(recipe(batch_size=1))


def test_inside_a_launcher_no_other_is_started(monkeypatch):
    trained = []
    started = two_gpus(monkeypatch, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("orpo_dist.train.train", trained.append)
    autotrain_launch.run(set_up(params()), "ddp")
    assert not started and trained[0].data.dataset_name == "rows.jsonl"


def test_one_process_trains_here_with_the_environment_of_the_run(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("orpo_dist.train.train", lambda recipe: seen.update(token=os.environ.get("HF_TOKEN")))
    autotrain_launch.run(set_up(params(token="t")), "deepspeed")
    assert seen == {"token": "t"} and "HF_TOKEN" not in os.environ
    assert "distributed_backend=deepspeed needs several GPUs" in capsys.readouterr().err


def relay(text, chunk):
    sink, data = io.BytesIO(), text.encode()
    relay = Relay(sink)
    for start in range(0, len(data), chunk):
        relay.feed(data[start : start + chunk])
    during = sink.getvalue().decode()
    return relay, during, relay.close(), sink.getvalue().decode()


REPORT = """E0101 torch/distributed/elastic/multiprocessing/api.py:874] failed (exitcode: {code}) local_rank: 0
Traceback (most recent call last):
  File "x.py", line 1, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
=====
  exitcode  : {code} (pid: 12)
"""


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_a_user_error_of_the_processes_is_one_readable_line(chunk):
    _, _, user_error, shown = relay("error: rows.jsonl is missing\n" + REPORT.format(code=2), chunk)
    assert user_error and shown == "error: rows.jsonl is missing\n"


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_any_other_report_is_passed_on(chunk):
    text = "step 1\n" + REPORT.format(code=-9)
    _, _, user_error, shown = relay(text, chunk)
    assert not user_error and shown == text


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_progress_and_tracebacks_that_end_are_passed_on_at_once(chunk):
    text = 'Traceback (most recent call last):\n  File "x.py"\nValueError: caught\nTraining 10%\rTraining 20%'
    _, during, user_error, shown = relay(text, chunk)
    assert during == shown == text and not user_error


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_running_out_of_memory_is_seen(chunk):
    assert relay("[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried\n", chunk)[0].out_of_memory
    assert not relay("all is well\n", chunk)[0].out_of_memory
