"""Start the training processes of `backend="local"`: as many as there are GPUs, one on a CPU.

One process trains in this one; several are started with `accelerate launch` and an accelerate config of this project.
With auto_find_batch_size, several processes that run out of memory are started again with smaller micro-batches and
the same global batch: inside the processes that cannot be done, since the rank that fails leaves the others waiting.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from orpo_dist.autotrain.setup import Setup
from orpo_dist.cli import BAD_INPUT
from orpo_dist.errors import UserError

_ACCELERATE_CONFIGS = {None: "ddp", "ddp": "ddp", "deepspeed": "zero2", "zero3": "zero3"}
_QLORA_VARIANTS = {"zero3": "zero3_qlora"}
_OUT_OF_MEMORY = (b"OutOfMemoryError", b"CUDA out of memory", b"DefaultCPUAllocator: can't allocate memory")
_TRACEBACK = b"Traceback (most recent call last):"
_LOG_LINE = re.compile(rb"[EW](\d{0,3}|\d{4}.*)")


class TrainingFailed(RuntimeError):
    """The training processes ended with an error, which they have printed."""

    def __init__(self, exit_code: int):
        super().__init__(f"the training processes failed (exit code {exit_code}); their error is above.")
        self.exit_code = exit_code


@dataclass(frozen=True)
class Attempt:
    """How one start of the training processes ended."""

    exit_code: int
    out_of_memory: bool


def gpu_count() -> int:
    """GPUs that this process may use; asked through NVML, so that no CUDA context is made here."""
    return torch.cuda.device_count()


def is_launched() -> bool:
    """Whether a launcher (accelerate, torchrun, srun with its variables) has started this process already."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join_processes(recipe: dict[str, Any]) -> None:
    """Inside a launcher: start the process group as the recipe says (backend, timeout), before any rank reads rows."""
    from orpo_dist.recipe.recipe import Recipe

    if is_launched():
        Recipe.from_mapping(recipe)


def run(setup: Setup, distributed_backend: str | None) -> None:
    """Train, in this process or in several.

    Raises:
        UserError: bad input; in several processes one that they have printed raises TrainingFailed.
        TrainingFailed: the processes failed.
    """
    processes = 1 if is_launched() else max(gpu_count(), 1)
    if processes > 1:
        quantised = bool(setup.recipe.get("load_in_4bit") or setup.recipe.get("load_in_8bit"))
        _run_processes(setup, accelerate_config(distributed_backend, quantised), processes)
        return
    if distributed_backend and not is_launched():
        print_note(f"distributed_backend={distributed_backend} needs several GPUs: training in one process.")
    from orpo_dist.distributed.ranks import leave_together
    from orpo_dist.recipe.recipe import Recipe
    from orpo_dist.train import train

    with _environment(setup.environment):
        train(Recipe.from_mapping(setup.recipe))
    if is_launched():
        leave_together()


def accelerate_config(distributed_backend: str | None, quantised: bool = False) -> Path:
    """The accelerate config of a backend: beside the package in a checkout, inside it in an installed wheel."""
    backend = _ACCELERATE_CONFIGS[distributed_backend]
    package, name = Path(__file__).parents[1], f"{_QLORA_VARIANTS.get(backend, backend) if quantised else backend}.yaml"
    folders = [package / "accelerate_configs", package.parent / "accelerate_configs"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{name} is neither in {folders[0]} nor in {folders[1]}: reinstall orpo-dist.")


def launch_command(recipe: dict[str, Any], recipe_path: Path, config: Path, processes: int) -> list[str]:
    """The command that starts `processes` training processes on this machine."""
    precision = "bf16" if recipe["bf16"] else "fp16" if recipe["fp16"] else "no"
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
        *("--num_machines", "1", "--num_processes", str(processes), "--mixed_precision", precision),
        *("--main_process_port", "0"),  # any free port: two runs may share the machine
        *("--module", "orpo_dist.cli", "train", str(recipe_path)),
    ]


def smaller_batches(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the next smaller micro-batch and the same number of pairs per device and optimizer step.

    Raises:
        UserError: one pair per device does not fit.
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
    if os.environ.get("RANK", "0") == "0":
        print(f"orpo-dist: {note}", file=sys.stderr, flush=True)


def _run_processes(setup: Setup, config: Path, processes: int) -> None:
    recipe = dict(setup.recipe)
    search = recipe.pop("auto_find_batch_size")
    while True:
        attempt = _start(recipe, setup.environment, config, processes)
        if attempt.exit_code == 0:
            return
        if not (search and attempt.out_of_memory):
            raise TrainingFailed(attempt.exit_code)
        recipe = smaller_batches(recipe)
        if any(Path(recipe["output_dir"]).glob("checkpoint-*")):
            recipe["resume_from_checkpoint"] = "auto"  # optimizer steps are the same, so none needs repeating
        print_note(
            f"out of memory: starting again with batch_size={recipe['per_device_train_batch_size']}, "
            f"gradient_accumulation={recipe['gradient_accumulation_steps']} (the same global batch)."
        )


def _start(recipe: dict[str, Any], environment: dict[str, str], config: Path, processes: int) -> Attempt:
    with tempfile.TemporaryDirectory(prefix="orpo-dist-") as folder:
        recipe_path = Path(folder) / "recipe.yaml"
        recipe_path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        command = launch_command(recipe, recipe_path, config, processes)
        print_note(f"starting {processes} processes: {' '.join(command)}")
        with (
            subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE) as process,
            _forward_sigterm(process),
        ):
            assert process.stderr is not None
            relay = Relay(sys.stderr.buffer)
            while data := os.read(process.stderr.fileno(), 65536):
                relay.feed(data)
            process.wait()
        user_error = relay.close()
        return Attempt(BAD_INPUT if user_error else process.returncode, relay.out_of_memory)


class Relay:
    """Passes the processes' stderr on as it comes, and looks for running out of memory.

    The launcher's own report about a process that failed (log lines and a traceback through torchrun) is held back to
    the end, and left out when the process had ended with a user error, whose one readable line has been passed on.
    """

    def __init__(self, sink: IO[bytes]):
        self.out_of_memory = False
        self._sink = sink
        self._tail = b""
        self._line = b""
        self._held: list[bytes] = []
        self._in_traceback = self._in_report = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream, of any length."""
        self._tail = (self._tail + data)[-70000:]
        self.out_of_memory |= any(sign in self._tail for sign in _OUT_OF_MEMORY)
        for piece in data.splitlines(keepends=True):
            self._line += piece
            if piece.endswith((b"\n", b"\r")):
                self._take_line()
            elif not (self._in_traceback or self._in_report or self._may_be_the_launchers(self._line)):
                self._pass_on(self._line)  # a progress bar does not end its line
                self._line = b""
        self._sink.flush()

    def close(self) -> bool:
        """Pass on what is held, unless it reports a user error. Returns whether it does."""
        self._held.append(self._line)
        report = b"".join(self._held)
        codes = re.findall(rb"exitcode\s*: (-?\d+)", report)
        user_error = bool(codes) and int(codes[-1]) == BAD_INPUT
        if not user_error:
            self._pass_on(report)
            self._sink.flush()
        return user_error

    @staticmethod
    def _may_be_the_launchers(start: bytes) -> bool:
        """Whether an unfinished line could become a traceback or a log line of torchrun (`E0131 10:00:00 ...`)."""
        return _TRACEBACK.startswith(start[: len(_TRACEBACK)]) or bool(_LOG_LINE.fullmatch(start))

    def _take_line(self) -> None:
        line, self._line = self._line, b""
        if self._in_report:
            self._held.append(line)
        elif self._in_traceback:
            self._held.append(line)
            if not line.startswith(b" "):  # the exception itself ends a traceback
                self._in_traceback = False
                self._in_report = b"ChildFailedError" in line
                if not self._in_report:
                    self._release()
        elif line.startswith(_TRACEBACK):
            self._held.append(line)
            self._in_traceback = True
        elif b"torch/distributed/elastic/" in line:
            self._held.append(line)
        else:
            self._pass_on(line)

    def _release(self) -> None:
        self._pass_on(b"".join(self._held))
        self._held = []

    def _pass_on(self, data: bytes) -> None:
        self._sink.write(data)


@contextmanager
def _forward_sigterm(process: subprocess.Popen) -> Iterator[None]:
    """Ending this process ends the training processes too, instead of leaving them on the GPUs."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
