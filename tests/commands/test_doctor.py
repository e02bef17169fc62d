import re
from importlib import metadata
from pathlib import Path

import pytest

from orpo_dist.commands import doctor
from orpo_dist.commands.doctor import DoctorReport, main
from orpo_dist.commands.doctor_checks import Check, tested_versions

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
    tested = tested_versions()
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
    assert too_old.fix == f"pip install 'peft=={tested_versions()['peft']}'"
    assert _named(doctor._packages, "deepspeed").state == "note"
    other = _named(doctor._packages, "trl")
    assert (other.state, other.detail) == ("note", f"99.0, tested with {tested_versions()['trl']}")


def test_local_build_of_the_tested_version_is_the_tested_version(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: tested_versions()[name] + "+cu130")
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
