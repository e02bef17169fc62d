"""`orpo-dist doctor`: what this machine has, what is missing, and the command that fixes it."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from orpo_dist.cluster.files import shipped

OLDEST_PYTHON = (3, 10)
REQUIRED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
EXTRAS = {"deepspeed": "deepspeed", "bitsandbytes": "qlora"}
# A cache that cannot take a small model, and one that takes few large ones.
SCANT_GIB, LOW_GIB = 2, 30
GIB = 1024**3

State = Literal["ok", "note", "missing"]
_SIGNS = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}


@dataclass(frozen=True)
class Check:
    """One line of the report. `missing`: training cannot run; `note`: something optional is not there."""

    name: str
    state: State
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class DoctorReport:
    checks: list[Check]

    @property
    def ready(self) -> bool:
        """Whether training can run at all."""
        return all(check.state != "missing" for check in self.checks)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        width = max(len(check.name) for check in self.checks)
        text = []
        for check in self.checks:
            text.append(f"{_SIGNS[check.state]} {check.name:{width}}  {check.detail}")
            if check.fix:
                text.append(f"{'':8}{'':{width}}  -> {check.fix}")
        return [*text, "", "Training can run." if self.ready else "Training cannot run: see MISSING above."]


def report() -> DoctorReport:
    """Examine this machine. Takes some seconds; uses no network and changes nothing."""
    parts: list[Callable[[], Iterator[Check]]] = [
        _python,
        _packages,
        _devices,
        _attention,
        _bitsandbytes,
        _deepspeed,
        _disk,
        _hub,
    ]
    return DoctorReport([check for part in parts for check in _examine(part)])


def main(argv: list[str]) -> int:
    """`orpo-dist doctor`: prints the report; exit code 0 when training can run, else 1."""
    argparse.ArgumentParser(
        prog="orpo-dist doctor",
        description="What this machine has, what is missing, and the command that fixes it.",
        allow_abbrev=False,
    ).parse_args(argv)
    found = report()
    print("\n".join(found.lines()))
    return 0 if found.ready else 1


def tested_versions() -> dict[str, str]:
    """Versions this release was tested with (constraints.txt)."""
    lines = shipped("constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): version.strip() for name, version in pins}


def _examine(part: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """A check that fails is a finding, not the end of the report."""
    try:
        yield from part()
    except Exception as error:
        yield Check(part.__name__.lstrip("_"), "note", f"could not be examined: {type(error).__name__}: {error}")


def _python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        yield Check("python", "missing", f"{version} is too old", "install Python 3.10 or newer")
    else:
        yield Check("python", "ok", f"{version} at {sys.executable}")


def _packages() -> Iterator[Check]:
    tested, admitted = tested_versions(), _admitted_versions()
    for name in (*REQUIRED, *EXTRAS):
        extra = EXTRAS.get(name)
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            fix = f"pip install 'orpo-dist[{extra}]'" if extra else f"pip install '{name}=={tested[name]}'"
            yield Check(name, "note" if extra else "missing", "not installed", fix)
            continue
        problem = _import_problem(name)
        if problem:
            yield Check(
                name,
                "note" if extra else "missing",
                f"{installed} cannot be imported: {problem}",
                f"pip install --force-reinstall '{name}=={tested[name]}'",
            )
        elif name in admitted and not admitted[name].specifier.contains(installed, prereleases=True):
            yield Check(
                name,
                "note" if extra else "missing",
                f"{installed}, needs {admitted[name].specifier}",
                f"pip install '{name}=={tested[name]}'",
            )
        elif Version(installed).public != tested[name]:
            yield Check(name, "note", f"{installed}, tested with {tested[name]}")
        else:
            yield Check(name, "ok", f"{installed}, the tested version")


def _admitted_versions() -> dict[str, Requirement]:
    """The ranges of pyproject.toml, as the installed package declares them."""
    try:
        declared = metadata.requires("orpo-dist") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        declared = []
    requirements = [Requirement(line) for line in declared]
    return {requirement.name: requirement for requirement in requirements if requirement.specifier}


def _import_problem(name: str) -> str | None:
    if name in EXTRAS:  # examined below, by doing something with them
        return None
    try:
        import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _devices() -> Iterator[Check]:
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


def _attention() -> Iterator[Check]:
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


def _bitsandbytes() -> Iterator[Check]:
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


# In a process of its own: the import prints, takes seconds and settles on an accelerator.
_DEEPSPEED_PROBE = """
import json
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import CPUAdamBuilder
found = {"device": get_accelerator().device_name(), "cpu_adam": CPUAdamBuilder().is_compatible(verbose=False)}
print("PROBE" + json.dumps(found))
"""


def _deepspeed() -> Iterator[Check]:
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
    """DeepSpeed compiles its ops with g++, Python's headers and ninja; without them ZeRO does not start on a CPU."""
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


def _disk() -> Iterator[Check]:
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


def _hub() -> Iterator[Check]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Check(
            "hub",
            "note",
            "offline (HF_HUB_OFFLINE): models and data must be in the cache or in folders",
            "hf download OWNER/NAME where there is a network, or unset HF_HUB_OFFLINE",
        )
    if get_token() is None:
        yield Check("hub login", "note", "none; gated and private models need one", "hf auth login")
    else:
        yield Check("hub login", "ok", "a token is set")
