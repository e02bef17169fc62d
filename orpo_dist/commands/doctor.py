"""`orpo-dist doctor`: what this machine has, what is missing, and the command that fixes it.

The checks of Python, packages and the hub login are here, those of the hardware in doctor_checks.py.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata

from packaging.requirements import Requirement
from packaging.version import Version

from orpo_dist.commands import doctor_checks
from orpo_dist.commands.doctor_checks import Check, tested_versions
from orpo_dist.images import torchvision

OLDEST_PYTHON = (3, 10)
REQUIRED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
EXTRAS = {"deepspeed": "deepspeed", "bitsandbytes": "qlora"}
_SIGNS = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}


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
    """Examine this machine. Takes a few seconds, uses no network and changes nothing."""
    parts: list[Callable[[], Iterator[Check]]] = [
        _python,
        _packages,
        _torchvision,
        doctor_checks.devices,
        doctor_checks.attention,
        doctor_checks.bitsandbytes,
        doctor_checks.deepspeed,
        doctor_checks.disk,
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


def _examine(part: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The results of a check. If it raises, that is reported as a note."""
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


def _torchvision() -> Iterator[Check]:
    problem = torchvision.problem()
    if problem is None:
        yield Check(torchvision.NAME, "ok", metadata.version(torchvision.NAME))
    else:
        detail = f"{problem.removeprefix('torchvision ')}: {torchvision.USERS} train on text alone"
        yield Check(torchvision.NAME, "note", detail, torchvision.remedy())


def _admitted_versions() -> dict[str, Requirement]:
    """The ranges of pyproject.toml, as the installed package declares them."""
    try:
        declared = metadata.requires("orpo-dist") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        declared = []
    requirements = [Requirement(line) for line in declared]
    return {requirement.name: requirement for requirement in requirements if requirement.specifier}


def _import_problem(name: str) -> str | None:
    if name in EXTRAS:  # doctor_checks.py runs something with these
        return None
    try:
        import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


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
