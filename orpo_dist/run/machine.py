"""Versions, device and peak memory of this machine."""

import resource
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
from accelerate.utils import gather_object

from orpo_dist.version import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "deepspeed", "bitsandbytes")


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated by torch on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, see getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_memory_of_ranks(device: torch.device) -> list[float]:
    """Peak memory of each rank in GiB, in rank order. Every rank must call it."""
    return gather_object([round(peak_memory_gib(device), 3)])


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """Versions of Python, this package and its installed dependencies."""
    found = {"python": sys.version.split()[0], "orpo_dist": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found
