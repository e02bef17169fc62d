"""Pairs and tokens per second, FLOPs, MFU and peak memory: from host numbers alone, so nothing waits for the device.

Model FLOPs of one pair in the shared layout:

    linear layers   2 * parameters * (P + C + R) forward, the same for the gradient of the input, and once more for the
                    gradient of the weight where it is trained
    attention       4 * query width * query-key pairs forward, twice that backward, per layer of attention
    loss head       2 * H * V * scored rows for the logits and for the gradient of the rows, and once more where the
                    head is trained

Recomputation (activation checkpointing) is not counted, so MFU says what the device does for the model.

Shape legend: P, C, R tokens of prompt, chosen and rejected, H hidden, V vocabulary.
"""

import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orpo_dist.model.vision import vision_modules
from orpo_dist.packing.sampler import PairLengths

# Dense bf16 peak of one device, FLOP/s, from the vendors' datasheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 191e12,
}


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs per token (linear layers), per query-key pair (attention) and per scored row (head), forward and backward.

    The text model's alone: embeddings are look-ups, and a vision tower is not counted.
    """

    per_token: float
    per_query_key: float
    per_scored_row: float

    @classmethod
    def of(cls, model: nn.Module) -> "ModelFlops":
        """Read off a model before it is wrapped. Quantised and partitioned layers are counted by their features."""
        config = model.config.get_text_config()  # type: ignore[union-attr,operator]
        head = model.get_output_embeddings()  # type: ignore[operator]
        base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        not_counted = vision_modules(base) | (set(head.modules()) if head is not None else set())
        per_token = 0.0
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D) and module not in not_counted:
                per_token += (6.0 if module.weight.requires_grad else 4.0) * _weights(module)
        per_token += sum(_expert_flops(model, config))
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        head_trained = head is not None and any(p.requires_grad for p in head.parameters())
        return cls(
            per_token=per_token,
            per_query_key=12.0 * config.num_attention_heads * width * _attention_layers(config),
            per_scored_row=(6.0 if head_trained else 4.0) * config.hidden_size * config.vocab_size,
        )

    def of_pair(self, pair: PairLengths, nll_scope: str) -> float:
        scored = pair.chosen + pair.rejected + (pair.prompt - 1 if nll_scope == "sequence" else 0)
        tokens = self.per_token * pair.shared_tokens
        return tokens + self.per_query_key * pair.query_keys + self.per_scored_row * scored


def _weights(layer: nn.Linear | Conv1D) -> int:
    """By the features: a quantised or partitioned weight has another shape. GPT-2's Conv1D is never quantised."""
    return layer.in_features * layer.out_features if isinstance(layer, nn.Linear) else layer.weight.numel()


def _attention_layers(config: PreTrainedConfig) -> int:
    """Layers in which every token sees every earlier one: not the linear attention, Mamba and convolutions of hybrids.
    A sliding window counts as whole, as it does for sequences within it."""
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return config.num_hidden_layers
    return sum(kind.endswith("attention") and kind != "linear_attention" for kind in kinds)


def _expert_flops(model: nn.Module, config) -> Iterable[float]:
    """Mixtures keep their experts as (experts, out, in) parameters, of which a token uses a few."""
    options = config.to_dict()
    experts = options.get("num_experts") or options.get("num_local_experts")
    if experts:
        share = options["num_experts_per_tok"] / experts
        for parameter in model.parameters():
            if parameter.dim() == 3 and parameter.shape[0] == experts:
                yield (6.0 if parameter.requires_grad else 4.0) * parameter.numel() * share


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of one device; None on a CPU and for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held at once by this process, GiB: the allocator's on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


class Throughput:
    """Counts what this rank computed since the last log line."""

    def __init__(self, flops: ModelFlops, nll_scope: str):
        self._flops, self._nll_scope = flops, nll_scope
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()
        self._pairs = self._tokens = self._padded_tokens = self._model_flops = 0.0

    def add(self, micro_batch: Iterable[PairLengths]) -> None:
        """Pairs of one micro-batch, without fillers."""
        pairs = list(micro_batch)
        if not pairs:
            return
        longest = max(pair.prompt + max(pair.chosen, pair.rejected) for pair in pairs)
        self._pairs += len(pairs)
        self._tokens += sum(pair.shared_tokens for pair in pairs)
        self._padded_tokens += 2 * len(pairs) * longest
        self._model_flops += self.flops_of(pairs)

    def flops_of(self, pairs: Iterable[PairLengths]) -> float:
        return sum(self._flops.of_pair(pair, self._nll_scope) for pair in pairs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training (evaluation, saving) is not counted."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Figures over all ranks since the last call; every rank must call it. Starts again from zero."""
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
