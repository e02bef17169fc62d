"""torchvision beside any torch: its import, where a build for another torch lacks the compiled operators.

Its package on PyPI is built for CUDA. Beside torch for CPUs its operators (nms, roi_align, ...) cannot be loaded, and
the import fails where it registers what they return; resizing and normalising are plain torch and work. The names are
declared here, and whoever calls one gets an error. To be imported before transformers and orpo_dist, which look at it.
`make setup` puts it into a folder of its own, so that all else runs as on a machine without it.
"""

import importlib
import importlib.util
import re
import site
import sys
from pathlib import Path

import torch


def _declare() -> torch.library.Library:
    package = importlib.util.find_spec("torchvision")
    if package is None:
        raise ModuleNotFoundError("The tests need torchvision: `make setup` installs the version of constraints.txt.")
    (folder,) = map(Path, package.submodule_search_locations or ())
    files = [folder / "_meta_registrations.py", folder / "_autograd_registrations.py"]
    text = "".join(file.read_text("utf-8") for file in files if file.is_file())
    names = {*re.findall(r"torchvision::(\w+)", text), *re.findall(r'register_meta\("(\w+)"', text)}
    operators = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        operators.define(f"{name}(Tensor x) -> Tensor")
    return operators


def _imports() -> bool:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # an operator does not exist
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True


site.addsitedir(str(Path(sys.prefix) / "test-packages"))
if importlib.util.find_spec("torchvision") is None or not _imports():
    _operators = _declare()
    importlib.import_module("torchvision")
