"""Returns freed memory to the operating system during CPU runs (malloc_trim).

A layer's temporaries share the heap with tensors that outlive it (the inputs that activation checkpointing keeps).
glibc returns memory only from the top of the heap, and a hole that holds part of a kept tensor is too small for the
next layer's largest temporary, so the heap grows with every layer. For SmolLM2-135M this exceeds all activations
together: docs/throughput.md has the figures. `malloc_trim` releases the holes, and the next layer faults their pages in
again. Trimming once a second, or a separate mapping for every large tensor (M_MMAP_THRESHOLD), costs 15 to 20% of a
step. So the heap is trimmed when the process has grown by a seventh: a few times per step for a model that fills
memory, never for a small one.
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
    trim = ctypes.CDLL(None).malloc_trim  # a ctypes call releases the GIL
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
