"""Checks of `orpo-dist doctor` that use the hardware: GPUs, attention, 4-bit products, DeepSpeed ops, disks."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from orpo_dist.cluster.files import shipped

# Below the first, not even a small model fits; below the second, only a few large ones.
SCANT_GIB, LOW_GIB = 2, 30
GIB = 1024**3

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Check:
    """One line of the report. `missing`: training cannot run; `note`: something optional is missing."""

    name: str
    state: State
    detail: str
    fix: str | None = None


def tested_versions() -> dict[str, str]:
    """Versions this release was tested with (constraints.txt)."""
    lines = shipped("constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): version.strip() for name, version in pins}


def devices() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver and torch.version.cuda is None:
            yield Check(
                "GPU",
                "note",
                f"{driver} is there, but torch {torch.__version__} is built without CUDA",
                "pip install --force-reinstall torch, from the index that pytorch.org names for your driver",
            )
        elif driver:
            yield Check(
                "GPU",
                "note",
                "torch sees none although nvidia-smi is there",
                "nvidia-smi  (driver? CUDA_VISIBLE_DEVICES?)",
            )
        else:
            yield Check("GPU", "note", f"none: training runs on the CPU ({os.cpu_count()} cores)")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        yield Check(f"GPU {index}", "ok", f"{device.name}, {device.total_memory / GIB:.0f} GiB, {bf16}")
    distributed = torch.distributed
    if torch.cuda.is_available() and not (distributed.is_available() and distributed.is_nccl_available()):
        yield Check(
            "NCCL",
            "missing",
            "this torch has none: several GPUs cannot work together",
            f"pip install --force-reinstall torch=={tested_versions()['torch']}",
        )
    elif torch.cuda.is_available():
        yield Check("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Check("NCCL", "note", "not used without a GPU; gloo is" if distributed.is_gloo_available() else "no gloo")


def attention() -> Iterator[Check]:
    import torch

    yield Check("sdpa attention", "ok", "part of torch")
    if find_spec("torch.nn.attention.varlen") is None:
        yield Check(
            "varlen attention",
            "note",
            "not in this torch; needs 2.11 or newer",
            f"pip install torch=={tested_versions()['torch']}",
        )
    elif torch.cuda.is_available():
        from torch.nn.attention.varlen import varlen_attn

        heads = torch.randn(16, 2, 64, device="cuda", dtype=torch.bfloat16)
        ends = torch.tensor([0, 6, 16], device="cuda", dtype=torch.int32)
        output = varlen_attn(heads, heads, heads, ends, ends, 10, 10)
        assert isinstance(output, torch.Tensor)  # a pair only when the log-sum-exp is asked for
        finite = output.isfinite().all().item()
        yield Check("varlen attention", "ok" if finite else "note", "runs on this GPU" if finite else "gives NaN here")
    else:
        yield Check("varlen attention", "note", "in this torch, runs on GPUs only; sdpa is used")
    if find_spec("flash_attn") is not None:
        yield Check("flash-attn", "ok", metadata.version("flash_attn"))
    else:
        yield Check("flash-attn", "note", "not installed, not needed where varlen attention runs")


def bitsandbytes() -> Iterator[Check]:
    if find_spec("bitsandbytes") is None:
        return  # named above
    import torch
    from bitsandbytes import functional, matmul_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator).to(device)
    rows = torch.randn(4, 64, generator=generator).to(device)
    quantised, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    product = matmul_4bit(rows, quantised.t(), quant_state=state)
    exact = rows @ weight.t()
    error = ((product - exact).norm() / exact.norm()).item()
    if error < 0.2:
        yield Check("4-bit matmul", "ok", f"runs on {device} (error {error:.0%} of a random product, as 4 bits have)")
    else:
        yield Check(
            "4-bit matmul",
            "note",
            f"wrong on {device}: error {error:.0%}",
            f"pip install --force-reinstall 'bitsandbytes=={tested_versions()['bitsandbytes']}'",
        )


# Run in a subprocess: the import prints, takes seconds and selects an accelerator.
_DEEPSPEED_PROBE = """
import json
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import CPUAdamBuilder
found = {"device": get_accelerator().device_name(), "cpu_adam": CPUAdamBuilder().is_compatible(verbose=False)}
print("PROBE" + json.dumps(found))
"""


def deepspeed() -> Iterator[Check]:
    if find_spec("deepspeed") is None:
        return  # named above
    import torch

    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _DEEPSPEED_PROBE], capture_output=True, text=True, timeout=180, env=environment
    )
    answers = [line.removeprefix("PROBE") for line in done.stdout.splitlines() if line.startswith("PROBE")]
    if not answers:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Check(
            "DeepSpeed ops",
            "note",
            f"deepspeed does not start: {last}",
            f"pip install --force-reinstall 'deepspeed=={tested_versions()['deepspeed']}'",
        )
    else:
        answer = json.loads(answers[0])
        offload = "optimizer offload possible" if answer["cpu_adam"] else "no optimizer offload (zero3_offload)"
        yield Check(
            "DeepSpeed ops",
            "ok" if answer["cpu_adam"] else "note",
            f"on {answer['device']}; compiled on first use; {offload}",
        )
    yield from _compiler()


def _compiler() -> Iterator[Check]:
    """DeepSpeed compiles its ops with g++, Python's headers and ninja. Without them ZeRO does not start on a CPU."""
    if shutil.which("g++") is None:
        yield Check("compiler", "note", "no g++: DeepSpeed cannot compile its ops", "apt-get install -y g++")
    elif not _compiles("#include <Python.h>\n"):
        yield Check(
            "compiler",
            "note",
            "g++ finds no Python.h: DeepSpeed cannot compile its ops",
            f"apt-get install -y python{sys.version_info[0]}.{sys.version_info[1]}-dev",
        )
    else:
        yield Check("compiler", "ok", "g++ with Python.h")
    if shutil.which("ninja") is None:
        beside = Path(sys.executable).parent
        fix = f'export PATH="{beside}:$PATH"' if (beside / "ninja").is_file() else "pip install ninja"
        yield Check("ninja", "note", "not on PATH: DeepSpeed cannot compile its ops", fix)
    else:
        yield Check("ninja", "ok", str(shutil.which("ninja")))


def _compiles(source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.cpp"
        file.write_text(source)
        include = sysconfig.get_path("include")
        command = ["g++", "-fsyntax-only", f"-I{include}", str(file)]
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def disk() -> Iterator[Check]:
    from huggingface_hub import constants

    for name, folder, fix in (
        ("disk of the cache", Path(constants.HF_HUB_CACHE), "export HF_HOME=/a/larger/disk"),
        ("disk of this folder", Path.cwd(), "start in a folder on a larger disk, or set output_dir to one"),
    ):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free / GIB
        writable = os.access(existing, os.W_OK)
        detail = f"{free:.0f} GiB free in {folder}" + ("" if writable else ", which is not writable")
        state: State = "missing" if free < SCANT_GIB or not writable else "note" if free < LOW_GIB else "ok"
        yield Check(name, state, detail, None if state == "ok" else fix)
