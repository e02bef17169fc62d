import ctypes
import platform
import threading

import pytest
import torch

from orpo_dist.training import malloc_trim as heap
from tests.trainer_runs import pairs


def resident_mib() -> float:
    return heap.resident_bytes() / 2**20


def trimmers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "malloc_trim"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_holes_go_back_to_the_system(monkeypatch):
    """Blocks below glibc's mapping threshold, every other one freed: the heap cannot shrink at its end."""
    monkeypatch.setattr(heap, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(heap, "GROWTH", 0.0)
    monkeypatch.setattr(heap, "LEAST_GROWTH", 2**20)
    ctypes.CDLL(None).mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD at its largest, as glibc sets it by itself in a run
    blocks = [torch.ones(2**18) for _ in range(200)]  # 1 MiB each
    full = resident_mib()
    del blocks[::2]
    holes = resident_mib()
    with heap.returning_freed_memory(torch.device("cpu")):
        (trimmer,) = trimmers()
        for _ in range(100):
            if resident_mib() < holes - 60:
                break
            blocks.append(torch.ones(3 * 2**18))  # fits no hole: the process grows, which is when it is trimmed
            trimmer.join(0.05)
    assert holes > full - 20 and resident_mib() < holes - 60
    assert not trimmers()


def test_only_on_a_cpu_and_over_with_the_block():
    with heap.returning_freed_memory(torch.device("cuda")):
        assert not trimmers()
    with pytest.raises(KeyError), heap.returning_freed_memory(torch.device("cpu")):
        raise KeyError
    assert not trimmers()


def test_a_run_trims_its_heap(trained, chat_tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr("orpo_dist.trainer.returning_freed_memory", _noted(seen))
    trained(pairs(8, len(chat_tokenizer)), max_steps=1)
    assert seen == [torch.device("cpu")]


def _noted(seen):
    def noted(device):
        seen.append(device)
        return heap.returning_freed_memory(device)

    return noted
