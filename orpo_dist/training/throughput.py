"""Pairs and tokens per second, FLOPs, MFU and peak memory, from host numbers only, so nothing waits for the device.

Model FLOPs of one pair in the shared layout:

    linear layers   2 * parameters * (P + C + R) forward, the same for the gradient of the input, and the same again
                    for the gradient of the weight if it is trained
    attention       4 * query width * query-key pairs forward, twice that backward, per layer of attention
    loss head       2 * H * V * scored rows for the logits, the same for the gradient of the rows, and the same again
                    if the head is trained

Recomputation (activation checkpointing) is not counted, as MFU is defined.

Shape legend: P, C, R tokens of prompt, chosen and rejected, H hidden, V vocabulary.
"""

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from orpo_dist.model.flops import ModelFlops
from orpo_dist.packing.lengths import PairLengths
from orpo_dist.run.machine import peak_memory_gib

# Dense bf16 peak of one device, FLOP/s, from the vendors' datasheets. Matched against the whole name of a
# device: an RTX A1000 is no A100, an H100 NVL no H100.
PEAK_FLOPS = {
    "B300": 2250e12,
    "GB300": 2500e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "GH200": 989e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 NVL": 836e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada Generation": 364e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI355X": 2517e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 191e12,
}
_VENDORS = {"NVIDIA", "AMD", "Tesla", "GeForce", "Instinct"}
_FORM = re.compile(r"SXM\d?|PCIE|PCIe|OAM|HBM\w*|\d+GB?")  # what may follow a device's name: its form and memory


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of one device; None on a CPU and for a device that is not in the table."""
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """By the name that the driver gives the device: `NVIDIA A100-SXM4-80GB`, `NVIDIA H100 NVL`. None for a part of a
    device (MIG, vGPU) and for its weaker namesakes (Laptop GPU)."""
    words = [word for word in name.split("/")[0].replace("-", " ").split() if word not in _VENDORS]
    for known, peak in PEAK_FLOPS.items():
        wanted = known.split()
        if words[: len(wanted)] == wanted and all(_FORM.fullmatch(word) for word in words[len(wanted) :]):
            return peak
    return None


class Throughput:
    """Counts what this rank computed since the last log line."""

    def __init__(self, flops: ModelFlops, nll_scope: str):
        self._flops, self._nll_scope = flops, nll_scope
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()
        self._pairs = self._tokens = self._padded_tokens = self._model_flops = 0.0

    def add(self, micro_batch: Iterable[PairLengths]) -> None:
        """Count the pairs of one micro-batch, without fillers."""
        pairs = list(micro_batch)
        if not pairs:
            return
        longest = max(pair.longest_sequence for pair in pairs)
        self._pairs += len(pairs)
        self._tokens += sum(pair.shared_tokens for pair in pairs)
        self._padded_tokens += 2 * len(pairs) * longest
        self._model_flops += self.flops_of(pairs)

    def flops_of(self, pairs: Iterable[PairLengths]) -> float:
        return sum(self._flops.of_pair(pair, self._nll_scope) for pair in pairs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time outside training (evaluation, saving) is not counted."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Figures over all ranks since the last call. Resets the counts. Every rank must call it."""
        seconds = time.perf_counter() - self._since
        sums = [self._pairs, self._tokens, self._padded_tokens, self._model_flops / 1e12]
        local = torch.tensor(sums, dtype=torch.float32, device=accelerator.device)
        pairs, tokens, padded_tokens, teraflops = accelerator.reduce(local, reduction="sum").tolist()
        self._start()
        if not pairs:
            return {}
        figures = {
            "pairs_per_second": pairs / seconds,
            "tokens_per_second": tokens / seconds,
            "padded_tokens_ratio": padded_tokens / tokens,
            "tflops_per_second": teraflops / seconds,
            "peak_memory_gib": peak_memory_gib(accelerator.device),
        }
        peak = peak_flops(accelerator.device)
        if peak is not None:
            figures["mfu"] = teraflops * 1e12 / seconds / (peak * accelerator.num_processes)
        return {name: round(value, 4) for name, value in figures.items()}
