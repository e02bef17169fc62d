import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from orpo_dist.commands import doctor_checks
from orpo_dist.commands.doctor_checks import Check


def _named(part, name: str) -> Check:
    return next(check for check in part() if check.name == name)


def test_gpu_with_a_torch_for_cpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor_checks.shutil, "which", lambda name: f"/usr/bin/{name}")
    check = _named(doctor_checks.devices, "GPU")
    assert "is built without CUDA" in check.detail and check.fix.startswith("pip install --force-reinstall torch")


def test_gpus_and_nccl(monkeypatch):
    device = SimpleNamespace(name="Some GPU", total_memory=80 * 1024**3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    checks = list(doctor_checks.devices())
    assert [check.name for check in checks] == ["GPU 0", "GPU 1", "NCCL"]
    assert checks[1].detail == "Some GPU, 80 GiB, bf16"
    assert checks[2].state == "missing"


def test_four_bit_matmul_that_computes_nonsense(monkeypatch):
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda rows, weight, quant_state: torch.zeros(4, 64))
    check = _named(doctor_checks.bitsandbytes, "4-bit matmul")
    assert (check.state, check.detail.split(":")[0]) == ("note", "wrong on cpu")
    assert check.fix.startswith("pip install --force-reinstall 'bitsandbytes==")


@pytest.mark.parametrize(
    ("absent", "name", "fix"), [("g++", "compiler", "apt-get install -y g++"), ("ninja", "ninja", "ninja")]
)
def test_compiler_and_ninja(monkeypatch, absent, name, fix):
    which = doctor_checks.shutil.which
    monkeypatch.setattr(doctor_checks.shutil, "which", lambda tool: None if tool == absent else which(tool) or tool)
    check = _named(doctor_checks._compiler, name)
    assert check.state == "note" and "cannot compile its ops" in check.detail
    assert fix in check.fix or check.fix.startswith("export PATH=")


def test_headers_of_python(monkeypatch, tmp_path):
    if doctor_checks.shutil.which("g++") is None:
        pytest.skip("no g++")
    assert doctor_checks._compiles("#include <Python.h>\n")
    assert not doctor_checks._compiles("#include <NoSuchHeader.h>\n")
    monkeypatch.setattr(doctor_checks, "_compiles", lambda source: False)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert _named(doctor_checks._compiler, "compiler").fix == f"apt-get install -y python{version}-dev"


def test_deepspeed_that_does_not_start(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nRuntimeError: no CUDA_HOME\n")
    monkeypatch.setattr(doctor_checks.subprocess, "run", lambda *args, **kwargs: failed)
    check = _named(doctor_checks.deepspeed, "DeepSpeed ops")
    assert check.state == "note" and "RuntimeError: no CUDA_HOME" in check.detail


@pytest.mark.parametrize(("free_gib", "state"), [(1, "missing"), (10, "note"), (500, "ok")])
def test_disk(monkeypatch, free_gib, state):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda path: usage(0, 0, free_gib * 1024**3))
    cache = _named(doctor_checks.disk, "disk of the cache")
    assert cache.state == state
    assert (cache.fix is None) == (state == "ok")
    assert f"{free_gib} GiB free" in cache.detail
