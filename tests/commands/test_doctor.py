import re
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from orpo_dist.commands import doctor
from orpo_dist.commands.doctor import Check, DoctorReport, main

ROOT = Path(__file__).parents[2]


def _named(part, name: str) -> Check:
    return next(check for check in doctor._examine(part) if check.name == name)


def test_this_machine_can_train(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("Training can run.\n")
    for name in ("python", "torch", "transformers", "GPU", "NCCL", "4-bit matmul", "compiler", "ninja", "disk", "hub"):
        assert re.search(rf"^(ok|note) +{name}", printed, re.MULTILINE), name
    assert "could not be examined" not in printed


def test_exit_code_is_1_when_something_needed_is_missing(monkeypatch, capsys):
    broken = DoctorReport([Check("torch", "missing", "not installed", "pip install torch"), Check("hub", "note", "-")])
    monkeypatch.setattr(doctor, "report", lambda: broken)
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert "MISSING torch  not installed" in printed
    assert "-> pip install torch" in printed
    assert "Training cannot run" in printed


def test_tested_versions_come_from_the_constraints():
    tested = doctor.tested_versions()
    assert set(doctor.REQUIRED) | set(doctor.EXTRAS) <= set(tested)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"torch=={tested['torch']}" in lines
    assert f"bitsandbytes=={tested['bitsandbytes']}" in lines
    # and a wheel carries that file
    assert '"constraints.txt" = "orpo_dist/constraints.txt"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("package", "state", "fix"),
    [("trl", "missing", "pip install 'trl=="), ("bitsandbytes", "note", "pip install 'orpo-dist[qlora]'")],
)
def test_missing_package(monkeypatch, package, state, fix):
    installed = metadata.version

    def version(name):
        if name == package:
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    check = _named(doctor._packages, package)
    assert (check.state, check.detail) == (state, "not installed")
    assert check.fix.startswith(fix)


def test_versions_that_differ(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["peft>=0.19", 'deepspeed>=0.19; extra == "deepspeed"'])
    versions = {"peft": "0.18.2", "deepspeed": "0.10", "trl": "99.0"}
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or installed(name))
    too_old = _named(doctor._packages, "peft")
    assert (too_old.state, too_old.detail) == ("missing", "0.18.2, needs >=0.19")
    assert too_old.fix == f"pip install 'peft=={doctor.tested_versions()['peft']}'"
    assert _named(doctor._packages, "deepspeed").state == "note"
    other = _named(doctor._packages, "trl")
    assert (other.state, other.detail) == ("note", f"99.0, tested with {doctor.tested_versions()['trl']}")


def test_local_build_of_the_tested_version_is_the_tested_version(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: doctor.tested_versions()[name] + "+cu130")
    assert _named(doctor._packages, "torch").state == "ok"


def test_package_that_does_not_import(monkeypatch):
    def broken(name):
        if name == "peft":
            raise ImportError("libfoo.so: cannot open")

    monkeypatch.setattr(doctor, "import_module", broken)
    check = _named(doctor._packages, "peft")
    assert check.state == "missing" and "ImportError: libfoo.so: cannot open" in check.detail
    assert check.fix.startswith("pip install --force-reinstall 'peft==")


def test_old_python(monkeypatch):
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (4, 0))
    assert _named(doctor._python, "python").state == "missing"


def test_gpu_with_a_torch_for_cpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    check = _named(doctor._devices, "GPU")
    assert "is built without CUDA" in check.detail and check.fix.startswith("pip install --force-reinstall torch")


def test_gpus_and_nccl(monkeypatch):
    device = SimpleNamespace(name="Some GPU", total_memory=80 * 1024**3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    checks = list(doctor._devices())
    assert [check.name for check in checks] == ["GPU 0", "GPU 1", "NCCL"]
    assert checks[1].detail == "Some GPU, 80 GiB, bf16"
    assert checks[2].state == "missing"


def test_four_bit_matmul_that_computes_nonsense(monkeypatch):
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda rows, weight, quant_state: torch.zeros(4, 64))
    check = _named(doctor._bitsandbytes, "4-bit matmul")
    assert (check.state, check.detail.split(":")[0]) == ("note", "wrong on cpu")
    assert check.fix.startswith("pip install --force-reinstall 'bitsandbytes==")


@pytest.mark.parametrize(
    ("absent", "name", "fix"), [("g++", "compiler", "apt-get install -y g++"), ("ninja", "ninja", "ninja")]
)
def test_compiler_and_ninja(monkeypatch, absent, name, fix):
    which = doctor.shutil.which
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: None if tool == absent else which(tool) or tool)
    check = _named(doctor._compiler, name)
    assert check.state == "note" and "cannot compile its ops" in check.detail
    assert fix in check.fix or check.fix.startswith("export PATH=")


def test_headers_of_python(monkeypatch, tmp_path):
    if doctor.shutil.which("g++") is None:
        pytest.skip("no g++")
    assert doctor._compiles("#include <Python.h>\n")
    assert not doctor._compiles("#include <NoSuchHeader.h>\n")
    monkeypatch.setattr(doctor, "_compiles", lambda source: False)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert _named(doctor._compiler, "compiler").fix == f"apt-get install -y python{version}-dev"


def test_deepspeed_that_does_not_start(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nRuntimeError: no CUDA_HOME\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: failed)
    check = _named(doctor._deepspeed, "DeepSpeed ops")
    assert check.state == "note" and "RuntimeError: no CUDA_HOME" in check.detail


@pytest.mark.parametrize(("free_gib", "state"), [(1, "missing"), (10, "note"), (500, "ok")])
def test_disk(monkeypatch, free_gib, state):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(0, 0, free_gib * 1024**3))
    cache = _named(doctor._disk, "disk of the cache")
    assert cache.state == state
    assert (cache.fix is None) == (state == "ok")
    assert f"{free_gib} GiB free" in cache.detail


def test_hub_login_without_the_token(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert _named(doctor._hub, "hub login").fix == "hf auth login"
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_very_secret")
    login = _named(doctor._hub, "hub login")
    assert login.state == "ok"
    assert "secret" not in str(login)


def test_offline_is_said(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in _named(doctor._hub, "hub").detail
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert all(check.name != "hub" for check in doctor._hub())


def test_a_failing_check_does_not_end_the_report(monkeypatch):
    def _broken():
        yield Check("first", "ok", "fine")
        raise RuntimeError("driver mismatch")

    first, second = doctor._examine(_broken)
    assert first.state == "ok"
    assert (second.state, second.detail) == ("note", "could not be examined: RuntimeError: driver mismatch")
