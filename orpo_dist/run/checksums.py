"""SHA-256 of the files of a checkpoint. hashlib releases the GIL: several files are read at once.

Figures: docs/runs.md, measured by benchmarks/checkpoint_saving.py.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

THREADS = 4  # of each rank; the ranks of a node share its files
_BLOCK = 4 * 2**20


def checksums(folder: Path, names: list[str]) -> dict[str, str]:
    """Name below `folder` -> SHA-256 of its content. Raises OSError for a file that cannot be read."""
    with ThreadPoolExecutor(max(1, min(THREADS, len(names), os.cpu_count() or 1))) as threads:
        return dict(zip(names, threads.map(lambda name: _sha256(folder / name), names), strict=True))


def share(sizes: Mapping[str, int], part: int, parts: int) -> list[str]:
    """The files that rank `part` of `parts` reads, largest first. Together the shares are all files, and each is of
    about the same size. The same on every rank."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name] + 1  # empty files are divided too
    return shares[part]


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
