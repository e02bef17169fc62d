"""Apple's GPUs have no float64."""

import re
from pathlib import Path

import torch

import orpo_dist
from orpo_dist.distributed.devices import widest_float

# Where float64 is used all the same, and why an Apple GPU does not see it.
ON_THE_HOST_OR_CUDA = {
    "distributed/devices.py": "the choice itself",
    "model/attention/kernels.py": "trials of CUDA kernels",
    "model/head/fused_loss.py": "a comparison with the weights' dtype",
    "model/head/install.py": "on the CPU, after the copy",
    "model/loading/trained.py": "on the CPU, after the copy",
    "packing/layout.py": "counts on the host",
    "packing/padded.py": "counts on the host",
    "training/step_guard.py": "initial values on the host",
}


def test_by_device():
    assert widest_float(torch.device("mps")) == torch.float32
    assert {widest_float(torch.device(kind)) for kind in ("cpu", "cuda", "xpu")} == {torch.float64}


def test_no_other_module_asks_for_float64():
    package = Path(orpo_dist.__file__).parent
    users = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"torch\.(float64|double)\b|\.double\(\)", path.read_text("utf-8"))
    }
    assert users <= ON_THE_HOST_OR_CUDA.keys()
