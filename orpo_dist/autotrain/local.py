"""Start the training processes of `backend="local"`: as many as there are GPUs, one on a CPU.

A single process trains in this one. Several are started with the launcher of `orpo-dist launch` and an accelerate
config of this project. With auto_find_batch_size, processes that run out of memory are restarted with smaller
micro-batches and the same global batch. They cannot do that themselves: a failing rank leaves the others waiting.
"""

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from orpo_dist.autotrain.setup import Setup
from orpo_dist.cluster.ends import VARIABLE, End, read_ends
from orpo_dist.cluster.files import accelerate_config
from orpo_dist.cluster.processes import Placement, launcher_command, run_launcher
from orpo_dist.distributed.environment import is_launched_with_others, launched_rank
from orpo_dist.errors import FINISHED, STOPPED, RunStopped, TrainingFailed, UserError

_CONFIGS = {None: "ddp", "ddp": "ddp", "deepspeed": "zero2", "zero3": "zero3"}
_QUANTISED_CONFIGS = {"zero3": "zero3_qlora"}


@dataclass(frozen=True)
class Attempt:
    """How one start of the training processes ended.

    Attributes:
        stopped: the stop of the processes, if exit_code is STOPPED.
    """

    exit_code: int
    out_of_memory: bool
    stopped: RunStopped | None = None


def gpu_count() -> int:
    """Number of GPUs visible to this process. Does not create a CUDA context."""
    return torch.cuda.device_count()


def join_processes(recipe: dict[str, Any]) -> None:
    """Under a launcher: start the process group with the recipe's backend and timeout, before any rank reads rows."""
    from orpo_dist.recipe.recipe import Recipe

    if is_launched_with_others():
        Recipe.from_mapping(recipe)


def run(setup: Setup, distributed_backend: str | None) -> None:
    """Train in this process, or in several.

    Raises:
        UserError: bad input, when training in this process.
        TrainingFailed: the processes failed, also for bad input; they have printed the error.
        RunStopped: the run stopped on request and can be resumed.
    """
    processes = 1 if is_launched_with_others() else max(gpu_count(), 1)
    if processes > 1:
        _run_processes(setup, config_of(distributed_backend, setup.recipe), processes)
        return
    if distributed_backend and not is_launched_with_others():
        print_note(f"distributed_backend={distributed_backend} needs several GPUs: training in one process.")
    from orpo_dist.distributed.ranks import leave_together
    from orpo_dist.recipe.recipe import Recipe
    from orpo_dist.train import train

    with _environment(setup.environment):
        train(Recipe.from_mapping(setup.recipe))
    if is_launched_with_others():
        leave_together()


def config_of(distributed_backend: str | None, recipe: dict[str, Any]) -> str:
    """The name of the accelerate config of a backend. Sharding quantised weights needs a separate one."""
    name = _CONFIGS[distributed_backend]
    quantised = bool(recipe.get("load_in_4bit") or recipe.get("load_in_8bit"))
    return _QUANTISED_CONFIGS.get(name, name) if quantised else name


def smaller_batches(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the next smaller micro-batch and the same number of pairs per device and optimizer step.

    Raises:
        UserError: even one pair per device does not fit.
    """
    batch = recipe["per_device_train_batch_size"]
    pairs = batch * recipe["gradient_accumulation_steps"]
    if batch == 1:
        raise UserError(
            "Out of memory with one pair per device: lower block_size, use peft and quantization=int4, or "
            "distributed_backend=zero3."
        )
    batch = max(size for size in range(1, batch // 2 + 1) if pairs % size == 0)
    return recipe | {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": pairs // batch,
        "per_device_eval_batch_size": min(batch, recipe["per_device_eval_batch_size"]),
    }


def print_note(note: str) -> None:
    """One line on stderr, from the first process only."""
    launched = launched_rank()
    if launched is None or launched.is_first:
        print(f"orpo-dist: {note}", file=sys.stderr, flush=True)


def _run_processes(setup: Setup, config: str, processes: int) -> None:
    recipe = dict(setup.recipe)
    search = recipe.pop("auto_find_batch_size")
    while True:
        attempt = _start(recipe, setup.environment, config, processes)
        if attempt.exit_code == FINISHED:
            return
        if attempt.stopped is not None and not (search and attempt.out_of_memory):
            raise attempt.stopped
        if not (search and attempt.out_of_memory):
            raise TrainingFailed(attempt.exit_code)
        recipe = smaller_batches(recipe)
        if any(Path(recipe["output_dir"]).glob("checkpoint-*")):
            recipe["resume_from_checkpoint"] = "auto"  # the optimizer steps are the same, so none is repeated
        print_note(
            f"out of memory: restarting with batch_size={recipe['per_device_train_batch_size']}, "
            f"gradient_accumulation={recipe['gradient_accumulation_steps']} (the same global batch)."
        )


def _start(recipe: dict[str, Any], environment: dict[str, str], config: str, processes: int) -> Attempt:
    with tempfile.TemporaryDirectory(prefix="orpo-dist-") as folder:
        ends = Path(folder) / "ends"
        ends.mkdir()
        recipe_path = Path(folder) / "recipe.yaml"
        recipe_path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        command = launcher_command(
            config, accelerate_config(config), Placement(processes=processes), str(recipe_path), []
        )
        print_note(f"starting {processes} processes: {shlex.join(command)}")
        code = run_launcher(command, environment | {VARIABLE: str(ends)})
        return attempt_of(code, read_ends(ends))


def attempt_of(code: int, ends: list[End]) -> Attempt:
    """Combines the launcher's exit code with the ends recorded by its processes."""
    stopped = None
    if code == STOPPED:
        # All ranks stop at the same step. A rank that was still starting has no step.
        last = max(
            (end for end in ends if end.reason is not None), key=lambda end: end.step, default=End(reason="a signal")
        )
        stopped = RunStopped(str(last.reason), last.step, last.checkpoint, printed=True)
    return Attempt(code, any(end.out_of_memory for end in ends), stopped)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
