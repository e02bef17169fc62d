"""torchvision where it is missing, or installed and cannot be imported.

A build for another torch (for CUDA beside torch for CPUs) lacks its compiled operators and raises when it is imported.
transformers only looks whether the package is there: it would then fail to import its Trainer, of which text runs have
need too. So torchvision is tried once, just before transformers is imported, and hidden if it fails: transformers then
takes Pillow where it can. What needs torchvision names the `problem`.
"""

import importlib
import importlib.util
import sys
from importlib import metadata
from importlib.abc import MetaPathFinder
from typing import Any

NAME = "torchvision"
USERS = "Qwen-VL, Pixtral, InternVL, SmolVLM and LLaVA-OneVision"
_failures: list[BaseException] = []  # of its import, in this process


def watch_for_transformers() -> None:
    """Try torchvision when transformers is imported, and not before: the import takes torch's time."""
    if "transformers" in sys.modules:  # it has looked already, and keeps the answer
        _hide_if_broken()
        if _failures:
            sys.modules["transformers"].utils.is_torchvision_available.cache_clear()
    else:
        sys.meta_path.insert(0, _BeforeTransformers())


def problem() -> str | None:
    """Why torchvision cannot be used, as the part of a sentence; None if it can. Imports it."""
    _hide_if_broken()
    if _failures:
        error = _failures[0]
        cause = (str(error).splitlines() or [""])[0]
        versions = " beside torch ".join(map(_version, (NAME, "torch")))
        return f"torchvision {versions} cannot be imported ({type(error).__name__}: {cause})"
    return None if importlib.util.find_spec(NAME) else "torchvision is not installed"


def remedy() -> str:
    return f"install the build of torchvision that matches torch {_version('torch')} (https://pytorch.org/get-started)"


class _BeforeTransformers(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "transformers":
            sys.meta_path.remove(self)
            _hide_if_broken()


def _hide_if_broken() -> None:
    if _failures or NAME in sys.modules or importlib.util.find_spec(NAME) is None:
        return
    try:
        importlib.import_module(NAME)
    except Exception as error:  # RuntimeError: operators are missing; OSError: a library of CUDA is
        _failures.append(error)
        # The import system's own way to say that there is none: find_spec() gives None, and an import raises.
        # https://docs.python.org/3/reference/import.html#the-module-cache
        sys.modules[NAME] = None  # type: ignore[assignment]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(unknown version)"
