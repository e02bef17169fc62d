"""The heap of a run on a CPU: what was freed goes back to the system.

A layer's temporaries and the tensors that outlive it (the inputs that activation checkpointing keeps) come from the
same heap. glibc hands memory back at the heap's end only, and a hole that a kept tensor was cut from no longer fits the
next layer's largest temporary, so the heap grows with every layer. For SmolLM2-135M that is more than all activations
together: docs/throughput.md has the figures. `malloc_trim` gives the holes back, and the next layer's temporaries
take them again, page by page: doing it once a second, or giving every large tensor a mapping of its own
(M_MMAP_THRESHOLD), costs 15 to 20% of a step. So it is done when the process has grown by a seventh, a few times per
step of a model that fills memory, never for one that does not.
https://man7.org/linux/man-pages/man3/malloc_trim.3.html
"""

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SECONDS_BETWEEN_LOOKS = 0.1
GROWTH, LEAST_GROWTH = 0.15, 256 * 2**20


@contextmanager
def returning_freed_memory(device: torch.device) -> Iterator[None]:
    """Trims the heap from a thread while the block runs. Does nothing on an accelerator or without glibc."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    trim = ctypes.CDLL(None).malloc_trim  # a call through ctypes releases the interpreter's lock
    over = threading.Event()

    def trim_until_over() -> None:
        trimmed = resident_bytes()
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            now = resident_bytes()
            if now > trimmed + max(GROWTH * trimmed, LEAST_GROWTH):
                trim(0)
                trimmed = now = resident_bytes()
            trimmed = min(trimmed, now)

    thread = threading.Thread(target=trim_until_over, name="malloc_trim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
