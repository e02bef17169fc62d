import pytest
import torch

from orpo_dist.model.flops import ModelFlops
from orpo_dist.packing.lengths import PairLengths
from orpo_dist.training.throughput import Throughput

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
