"""Shared by the parts of gpu.py: models with realistic shapes, batches, the trainers to compare, time and memory.

A step is what every trainer does for one micro-batch: collate, forward, backward, optimizer. All trainers get the same
model, optimizer, activation checkpointing, autocast and pairs, and alternate in one process.
"""

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.trl_forward import concatenated_batch, trl_loss
from orpo_dist.loss import Objective, orpo_loss
from orpo_dist.model.flops import ModelFlops
from orpo_dist.model.head.install import install_head
from orpo_dist.model.loading.vision import freeze, frozen_parts, without_parts
from orpo_dist.model.packed.switch import use_packed_layout
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.lengths import PairLengths
from orpo_dist.packing.padded import PaddedCollator, score_padded
from orpo_dist.training.throughput import peak_flops

LENGTHS = Path(__file__).parent / "lengths"
OBJECTIVE = Objective(beta=0.1, label_smoothing=0.0)

# Shapes of https://huggingface.co/Qwen/Qwen3-1.7B and Qwen3-8B; the weights are random.
QWEN3 = dict(
    model_type="qwen3",
    vocab_size=151936,
    head_dim=128,
    num_key_value_heads=8,
    max_position_embeddings=40960,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-1.7b": {
        **QWEN3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Setting:
    """device: "cuda" or "cpu". tiny: shapes and lengths that a CPU runs in seconds."""

    device: torch.device
    tiny: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def out_of_memory(self) -> type[BaseException]:
        return torch.cuda.OutOfMemoryError if self.device.type == "cuda" else MemoryError


class Deadline:
    """Time left for a part, so that it ends with partial results instead of being killed without any."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


# ---------------------------------------------------------------- models and pairs


def build_model(setting: Setting, shape: str, *, lora: bool, checkpointing: bool = True) -> nn.Module:
    """A model of `shape` with random weights, made on the device, with non-reentrant activation checkpointing."""
    config = AutoConfig.for_model(**{**SHAPES[shape], **(TINY if setting.tiny else {})})
    return trainable(
        setting,
        lambda: AutoModelForCausalLM.from_config(config, dtype=setting.dtype),
        lora=lora,
        checkpointing=checkpointing,
    )


def trainable(
    setting: Setting, build: Callable[[], PreTrainedModel], *, lora: bool, checkpointing: bool = True
) -> nn.Module:
    """The model from `build`, set up as for training; vision tower and projector are frozen."""
    torch.manual_seed(0)
    with setting.device:
        model: Any = build()
    model.to(setting.device)  # buffers that a constructor created on the host
    frozen = frozen_parts(model, train_vision_tower=False, train_projector=False)
    freeze(model, frozen)
    if lora:
        lora_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(model, without_parts(lora_config, frozen))
        model.to(setting.device)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train()


def real_lengths(setting: Setting) -> list[PairLengths]:
    triples = json.loads((LENGTHS / "real.json").read_text())
    if setting.tiny:
        triples = [[max(1, n // 16) for n in triple] for triple in triples[:64]]
    return [PairLengths(*triple) for triple in triples]


def rows_of(lengths: Sequence[PairLengths], vocabulary: int) -> list[dict[str, Any]]:
    generator = random.Random(0)

    def ids(n: int) -> list[int]:
        return [generator.randrange(10, vocabulary) for _ in range(n)]

    return [
        {
            "prompt_ids": ids(pair.prompt),
            "chosen_ids": ids(pair.chosen),
            "rejected_ids": ids(pair.rejected),
            "weight": 1.0,
            "index": index,
        }
        for index, pair in enumerate(lengths)
    ]


def shuffled_batches(lengths: Sequence[PairLengths], count: int, size: int) -> list[list[int]]:
    """`count` batches of `size` pairs, each with one pair from every length quantile, as in a shuffled epoch."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i].shared_tokens)
    wanted = count * size
    picked = [order[int((k + 0.5) * len(order) / wanted)] for k in range(wanted)]
    return [picked[b::count] for b in range(count)]


def grouped_batches(batches: Sequence[list[int]], lengths: Sequence[PairLengths]) -> list[list[int]]:
    """The same pairs in batches of similar length: the minimum of padding for a padded trainer."""
    size = len(batches[0])
    every = sorted((i for batch in batches for i in batch), key=lambda i: _padded_length(lengths[i]))
    return [every[start : start + size] for start in range(0, len(every), size)]


def _padded_length(pair: PairLengths) -> int:
    return pair.prompt + max(pair.chosen, pair.rejected)


# ---------------------------------------------------------------- the trainers to compare


@dataclass(frozen=True)
class Trainer:
    """A way of training on micro-batches.

    packed: whether the model is switched to the packed layout. attention: else the implementation it is set to, None
    for the model's own default.
    grouped: whether it gets batches of similar length. note: for the table.
    """

    name: str
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    loss: Callable[[nn.Module, dict[str, Any]], torch.Tensor]
    packed: bool
    attention: str | None = None
    grouped: bool = False
    note: str = ""


def _packed_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    layout = batch.pop("orpo_layout")
    return model(**batch, orpo_layout=layout, use_cache=False)


def _padded_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    layout = batch.pop("orpo_layout")
    scores = score_padded(model(**batch, use_cache=False).logits, layout)
    return orpo_loss(scores, OBJECTIVE, layout.tokens, layout.pairs)


def _trl_step(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return trl_loss(model, batch, OBJECTIVE.beta)[0]


def fused_attention() -> str:
    """What a TRL user would choose for padded rows: flash-attn if it is installed."""
    return "flash_attention_2" if find_spec("flash_attn") is not None else "sdpa"


OURS = Trainer("ours", PackedCollator(True, "sequence"), _packed_loss, True, note="packed, prompt shared")
UNSHARED = Trainer("ours, unshared", PackedCollator(False, "sequence"), _packed_loss, True, note="packed")
PADDED = Trainer("ours, padded", PaddedCollator(0, "sequence"), _padded_loss, False, note="TRL's layout")
TRL_DEFAULT = Trainer("TRL, default", concatenated_batch, _trl_step, False, note="shuffled batches, sdpa")


def trl_best() -> Trainer:
    attention = fused_attention()
    return replace(TRL_DEFAULT, name="TRL, best", attention=attention, grouped=True,
                   note=f"batches of similar length, {attention}")  # fmt: skip


def bare(model: nn.Module) -> Any:
    """The model inside an adapter's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def switched(model: nn.Module, trainer: Trainer) -> Iterator[None]:
    """The model in the form that `trainer` needs."""
    base = bare(model)
    if not trainer.packed:
        before = base.config._attn_implementation
        base.set_attn_implementation(trainer.attention or before)
        try:
            yield
        finally:
            base.set_attn_implementation(before)
        return
    verdict = use_packed_layout(model, max_length=None)
    if not verdict.ok:
        raise RuntimeError(f"not packed: {verdict.reason}")
    install_head(model, OBJECTIVE)
    try:
        yield
    finally:
        verdict.restore()


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """As in the trainer: pinned and asynchronous on a GPU, with the totals of the step written into the layout."""
    moved = {}
    for name, value in batch.items():
        if name == "orpo_layout":
            counts = value.counts().float()
            if device.type == "cuda":
                value, counts = value.pin_memory(), counts.pin_memory()
            value.to(device)
            value.tokens, value.pairs = counts.to(device, non_blocking=True).unbind()
            moved[name] = value
        else:
            value = value.pin_memory() if device.type == "cuda" else value
            moved[name] = value.to(device, non_blocking=True)
    return moved


class Stepper:
    """Runs steps of any trainer on one model."""

    def __init__(self, setting: Setting, model: nn.Module):
        self.setting, self.model = setting, model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=setting.device.type == "cuda")

    def step(self, trainer: Trainer, rows: list[dict[str, Any]]) -> torch.Tensor:
        device = self.setting.device
        batch = to_device(trainer.collate(rows), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = trainer.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


# ---------------------------------------------------------------- figures


def static_bytes(model: nn.Module) -> int:
    """Bytes of the weights, plus gradients and the two AdamW moments of the trained ones."""
    return sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())


def compare(
    setting: Setting,
    model: nn.Module,
    trainers: Sequence[Trainer],
    lengths: Sequence[PairLengths],
    batches: Sequence[list[int]],
    *,
    deadline: Deadline,
    rounds: int = 3,
    rows: list[dict[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Each trainer over the same pairs, alternating. A trainer that runs out of memory is reported as such.

    rows: of `lengths`; unset, drawn.
    """
    rows = rows or rows_of(lengths, model.config.get_text_config().vocab_size)
    grouped = grouped_batches(batches, lengths)
    flops = ModelFlops.of(bare(model))
    work = sum(flops.of_pair(lengths[i], "sequence") for batch in batches for i in batch)
    pairs = sum(map(len, batches))
    stepper = Stepper(setting, model)
    warm_up: dict[str, float] = {}
    seconds: dict[str, list[float]] = {trainer.name: [] for trainer in trainers}
    peaks: dict[str, tuple[int | None, int | None]] = {}
    failed: dict[str, str] = {}

    def one_round(trainer: Trainer) -> float:
        setting.synchronize()
        start = time.perf_counter()
        for batch in grouped if trainer.grouped else batches:
            stepper.step(trainer, [rows[i] for i in batch])
        setting.synchronize()
        return time.perf_counter() - start

    for number in range(rounds + 1):
        for trainer in trainers:
            name = trainer.name
            if name in failed or (name in warm_up and deadline.left < 1.5 * warm_up[name]):
                continue
            _reset_memory(setting)
            try:
                with switched(model, trainer):
                    taken = one_round(trainer)
            except setting.out_of_memory():
                failed[name] = "out of memory"
                stepper.optimizer.zero_grad(set_to_none=True)
                continue
            if number == 0:  # kernels are chosen and compiled, memory is taken
                warm_up[name] = taken
            else:
                seconds[name].append(taken)
            peaks[name] = _peaks(setting)
    static = static_bytes(model)
    results: dict[str, dict[str, Any]] = {}
    for trainer in trainers:
        name = trainer.name
        if name in failed:
            results[name] = {"failed": failed[name], "note": trainer.note}
            continue
        median = statistics.median(seconds[name] or [warm_up[name]])
        allocated, reserved = peaks[name]
        results[name] = {
            "pairs_per_second": pairs / median,
            "model_flops_per_second": work / median,
            "mfu": _share_of_peak(setting, work / median),
            "peak_allocated": allocated,
            "peak_reserved": reserved,
            "above_static": None if allocated is None else allocated - static,
            "rounds": seconds[name],
            "warm_up": warm_up[name],
            "note": trainer.note,
        }
    return results


def _share_of_peak(setting: Setting, rate: float) -> float | None:
    peak = peak_flops(setting.device)
    return None if peak is None else rate / peak


def _reset_memory(setting: Setting) -> None:
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peaks(setting: Setting) -> tuple[int | None, int | None]:
    if setting.device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def median_seconds(setting: Setting, function: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of a call, from device events on a GPU, after two calls that warm up."""
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        if setting.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
    return statistics.median(times)
