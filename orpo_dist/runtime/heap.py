"""The heap of a run on a CPU: what was freed goes back to the system.

A layer's temporaries and the tensors that outlive it (the inputs that activation checkpointing keeps) come from the
same heap. glibc hands memory back at the heap's end only, and a hole that a kept tensor was cut from no longer fits the
next layer's largest temporary, so the heap grows with every layer. For SmolLM2-135M that is more than all activations
together: docs/throughput.md has the figures. `malloc_trim` gives the holes back and costs a few per cent of a step at
once a second; a mapping of its own for every large tensor (M_MMAP_THRESHOLD) saves a little more and costs 20.
https://man7.org/linux/man-pages/man3/malloc_trim.3.html
"""

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SECONDS_BETWEEN_TRIMS = 1.0


@contextmanager
def returning_freed_memory(device: torch.device) -> Iterator[None]:
    """Trims the heap from a thread while the block runs. Does nothing on an accelerator or without glibc."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    trim = ctypes.CDLL(None).malloc_trim  # a call through ctypes releases the interpreter's lock
    over = threading.Event()

    def trim_until_over() -> None:
        while not over.wait(SECONDS_BETWEEN_TRIMS):
            trim(0)

    thread = threading.Thread(target=trim_until_over, name="malloc_trim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
