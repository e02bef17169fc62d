import pytest
import torch

from orpo_dist.model.flops import ModelFlops
from orpo_dist.packing.lengths import PairLengths
from orpo_dist.training.throughput import PEAK_FLOPS, Throughput, named_peak

LENGTHS = [PairLengths(60, 30, 41), PairLengths(9, 50, 12), PairLengths(80, 20, 33)]


def test_counts_between_two_log_lines(tiny_llama):
    class OneProcess:
        device, num_processes = torch.device("cpu"), 1

        @staticmethod
        def reduce(tensor, reduction):
            return tensor

    throughput = Throughput(ModelFlops.of(tiny_llama(512)), "sequence")
    throughput.add(LENGTHS)
    throughput.add([])
    figures = throughput.drain(OneProcess)
    tokens, longest = sum(pair.shared_tokens for pair in LENGTHS), 80 + 33
    assert figures["padded_tokens_ratio"] == pytest.approx(6 * longest / tokens, abs=1e-4)
    assert figures["tokens_per_second"] / figures["pairs_per_second"] == pytest.approx(tokens / 3, rel=1e-3)
    assert figures["peak_memory_gib"] > 0.1
    assert throughput.drain(OneProcess) == {}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("Tesla A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada Generation"),
        ("AMD Instinct MI250X / MI250", "MI250X"),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA L400", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("GRID A100-10C", None),
    ],
)
def test_a_device_is_known_by_its_whole_name(name, known):
    assert named_peak(name) == (None if known is None else PEAK_FLOPS[known])
