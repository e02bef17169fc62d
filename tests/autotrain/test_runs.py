"""Real runs of `orpo-dist llm --train`, in one process and in two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, chat_tokenizer, tiny_llama):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(len(chat_tokenizer)).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data_folder(tmp_path):
    """A folder with a file per split; one answer is the text 42."""
    folder = tmp_path / "data"
    folder.mkdir()
    answers = [
        ("42", "41"),
        ("Open the settings.", "No."),
        ("Paris, of course.", "The river."),
        ("Let me check.", "user"),
    ]
    for split, rows in (("train", answers * 2), ("validation", answers[:2])):
        lines = [
            {"question": f"Question number {row}?", "good": good, "bad": bad} for row, (good, bad) in enumerate(rows)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def llm_command(model_folder, data_folder, run_folder, *flags):
    columns = ["--prompt-text-column", "question", "--text_column", "good", "--rejected-text-column", "bad"]
    return [
        *(sys.executable, "-m", "orpo_dist.cli", "llm", "--train", "--trainer", "orpo", "--model", str(model_folder)),
        *("--data-path", str(data_folder), "--project-name", str(run_folder), *columns, *flags),
    ]


def test_a_run_from_the_command_line(model_folder, data_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run_folder = tmp_path / "run"
    flags = "--valid-split=validation --peft --lora-r=4 --epochs=2 --lr=1e-2 --batch-size=1 --rl-gamma=0.9"
    command = llm_command(model_folder, data_folder, run_folder, *flags.split(), "--token", "hf_abcdefghijklmnop")
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "rl_gamma (PPO and GRPO)" in result.stderr
    assert "wandb" in result.stderr and "Traceback" not in result.stderr
    assert "become a user and an assistant turn" in result.stderr

    summary = json.loads((run_folder / "run_summary.json").read_text())
    assert (summary["pairs"], summary["steps"], summary["world_size"]) == (8, 4, 1)
    assert summary["eval_after"]["nll_loss"] < summary["eval_before"]["nll_loss"]
    assert len(list(run_folder.glob("checkpoint-*"))) <= 2  # the last and the best
    for path in run_folder.rglob("*"):
        assert path.is_dir() or b"hf_abcdefghijklmnop" not in path.read_bytes(), path
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert PeftModel.from_pretrained(base, run_folder).peft_config["default"].r == 4
    assert (run_folder / "merged" / "config.json").is_file()


def test_bad_input_is_one_line_and_exit_code_2(model_folder, data_folder, tmp_path):
    (data_folder / "train.jsonl").write_text('{"question": "q", "good": "a"\n')
    command = llm_command(model_folder, data_folder, tmp_path / "run", "--log", "none")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "train.jsonl" in result.stderr


# Pretends to have two GPUs. On a CPU both the config and the recipe must say so, or accelerate counts one process.
TWO_PROCESSES = """
import sys, yaml
from pathlib import Path
from orpo_dist import cli
from orpo_dist.autotrain import local

config, start = local.accelerate_config, local._start

def on_cpu(name):
    path = Path("accelerate.yaml").resolve()
    path.write_text(yaml.safe_dump({**yaml.safe_load(config(name).read_text()), "use_cpu": True}))
    return path

local.gpu_count = lambda: 2
local.accelerate_config = on_cpu
local._start = lambda recipe, *rest: start({**recipe, "use_cpu": True}, *rest)
"""
COMMAND_LINE = TWO_PROCESSES + "sys.exit(cli.main(sys.argv[1:]))"


def run_two_processes(command, folder, script=COMMAND_LINE):
    (folder / "two.py").write_text(script)
    command = [sys.executable, "two.py", *command[command.index("llm") :]]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.topology
def test_a_run_in_two_processes(model_folder, data_folder, tmp_path):
    run_folder = tmp_path / "run"
    flags = "--distributed-backend deepspeed --log none --valid-split validation --batch-size 1 --token hf_abcdefghijk"
    result = run_two_processes(llm_command(model_folder, data_folder, run_folder, *flags.split()), tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((run_folder / "run_summary.json").read_text())
    assert (summary["world_size"], summary["global_batch_size"], summary["steps"]) == (2, 8, 1)
    assert not any(b"hf_abcdefghijk" in path.read_bytes() for path in run_folder.rglob("*") if path.is_file())


@pytest.mark.topology
def test_bad_input_in_two_processes_is_one_line_too(model_folder, data_folder, tmp_path):
    (data_folder / "validation.jsonl").write_text('{"question": "q", "good": "a"\n')
    flags = "--distributed-backend deepspeed --log none --valid-split validation"
    result = run_two_processes(llm_command(model_folder, data_folder, tmp_path / "run", *flags.split()), tmp_path)
    assert result.returncode == 2
    assert (
        result.stderr.count("error") == 1 and "validation.jsonl" in result.stderr and "Traceback" not in result.stderr
    )


def a_long_run(model_folder, data_folder, tmp_path, script):
    """Starts a run of many steps in two processes and returns it after its first steps, with its run folder."""
    run_folder = tmp_path / "run"
    flags = ["--distributed-backend=deepspeed", "--log=none", "--batch-size=1", "--epochs=2000", "--save-strategy=no"]
    command = llm_command(model_folder, data_folder, run_folder, *flags, "--logging-steps", "1")
    (tmp_path / "two.py").write_text(script)
    run = subprocess.Popen(
        [sys.executable, "two.py", *command[command.index("llm") :]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)},
    )
    log, deadline = run_folder / "log.jsonl", time.monotonic() + 180
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert run.poll() is None and time.monotonic() < deadline, run.stderr.read()
        time.sleep(0.1)
    return run, run_folder


FROM_PYTHON = (
    TWO_PROCESSES
    + """
from orpo_dist.autotrain.project import main
from orpo_dist.errors import RunStopped
try:
    main(sys.argv[2:])
except RunStopped as stop:
    print("from Python:", stop.step, stop.checkpoint, file=sys.stderr)
    raise
"""
)


@pytest.mark.topology
@pytest.mark.parametrize(("number", "script"), [(signal.SIGUSR1, COMMAND_LINE), (signal.SIGTERM, FROM_PYTHON)])
def test_a_signal_stops_two_processes_with_a_checkpoint(number, script, model_folder, data_folder, tmp_path):
    run, run_folder = a_long_run(model_folder, data_folder, tmp_path, script)
    run.send_signal(number)
    _, told = run.communicate(timeout=180)
    assert run.returncode == 75, told
    (checkpoint,) = [path.parent for path in run_folder.glob("checkpoint-*/complete.json")]
    step = checkpoint.name.removeprefix("checkpoint-")
    assert told.count(f"orpo-dist: Stopped at step {step} ") == 1 and "Traceback" not in told
    if script is FROM_PYTHON:
        assert f"from Python: {step} {checkpoint}" in told


# Stands for `python -m orpo_dist.cli` in the processes. Rank 1 has memory for micro-batches of one pair.
LITTLE_MEMORY = """
import os, sys
import torch
from orpo_dist.cli import main
from orpo_dist.trainer import ORPOTrainer

compute_loss = ORPOTrainer.compute_loss

def limited(self, model, inputs, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.args.per_device_train_batch_size > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    return compute_loss(self, model, inputs, *args, **kwargs)

ORPOTrainer.compute_loss = limited
sys.exit(main(sys.argv[1:]))
"""
WITH_LITTLE_MEMORY = (
    TWO_PROCESSES
    + """
command = local.launcher_command

def with_little_memory(*arguments):
    words = command(*arguments)
    place = words.index("--module")
    return [*words[:place], "little_memory.py", *words[place + 2 :]]

local.launcher_command = with_little_memory
sys.exit(cli.main(sys.argv[1:]))
"""
)


@pytest.mark.topology
def test_out_of_memory_in_one_of_two_processes_starts_both_again(model_folder, data_folder, tmp_path):
    (tmp_path / "little_memory.py").write_text(LITTLE_MEMORY)
    run_folder = tmp_path / "run"
    flags = ["--distributed-backend=deepspeed", "--log=none", "--batch-size=2", "--auto-find-batch-size"]
    command = llm_command(model_folder, data_folder, run_folder, *flags, "--gradient-accumulation=2")
    result = run_two_processes(command, tmp_path, WITH_LITTLE_MEMORY)
    assert result.returncode == 0, result.stderr
    assert "batch_size=1, gradient_accumulation=4 (the same global batch)" in result.stderr
    assert result.stderr.count("orpo-dist: error (rank 1): Out of memory in step 1") == 1
    summary = json.loads((run_folder / "run_summary.json").read_text())
    assert (summary["world_size"], summary["global_batch_size"]) == (2, 8)
