"""Where the time of a step goes: device time by kind of work, from torch.profiler, and the rest of the wall time."""

import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu_harness import (
    OURS,
    Deadline,
    Setting,
    Stepper,
    build_model,
    median_seconds,
    real_lengths,
    rows_of,
    shuffled_batches,
    switched,
)
from orpo_dist.model.flops import ModelFlops
from orpo_dist.training.throughput import peak_flops

KINDS = ("attention", "MLP", "projections", "head", "optimizer", "key gather", "copies", "the rest")


def profile(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """Of the 8B-shaped LoRA run on real lengths. Idle is wall time without a kernel."""
    model = build_model(setting, "qwen3-8b", lora=True)
    config = model.config
    lengths = real_lengths(setting)
    rows = rows_of(lengths, config.vocab_size)
    batches = shuffled_batches(lengths, 3, 4)
    stepper = Stepper(setting, model)
    activities = [ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with switched(model, OURS):
        for batch in batches:
            stepper.step(OURS, [rows[i] for i in batch])
        setting.synchronize()
        start = time.perf_counter()
        for batch in batches:
            stepper.step(OURS, [rows[i] for i in batch])
        setting.synchronize()
        wall = time.perf_counter() - start
        with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
            for batch in batches:
                stepper.step(OURS, [rows[i] for i in batch])
            setting.synchronize()
    by_kind = dict.fromkeys(KINDS, 0.0)
    launches = 0
    largest: dict[str, float] = {}
    on_gpu = setting.device.type == "cuda"
    for event in recorded.key_averages(group_by_input_shape=True):
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if seconds <= 0 or (on_gpu and event.device_type == torch.autograd.DeviceType.CUDA):
            continue  # the entry of a kernel; its time is included in the operation that launched it
        kind = kind_of(event.key, event.input_shapes, config.intermediate_size, config.vocab_size)
        by_kind[kind] += seconds
        launches += event.count
        largest[event.key] = largest.get(event.key, 0.0) + seconds
    steps = len(batches)
    flops = ModelFlops.of(model.get_base_model())
    work = sum(flops.of_pair(lengths[i], "sequence") for batch in batches for i in batch)
    busy = sum(by_kind.values())
    matmul = _matmul_rate(setting)
    peak = peak_flops(setting.device)
    return {
        "seconds_per_step": wall / steps,
        "kinds": {kind: seconds / steps for kind, seconds in by_kind.items()},
        "idle": max(0.0, wall - busy) / steps,
        "operations_per_step": launches / steps,
        "largest": dict(sorted(largest.items(), key=lambda entry: -entry[1])[:12]),
        "model_flops_per_second": work / wall,
        "mfu": None if peak is None else work / wall / peak,
        "matmul_flops_per_second": matmul,
        "share_of_matmul_rate": work / wall / matmul,
    }


def kind_of(operation: str, shapes: list, intermediate_size: int, vocabulary: int) -> str:
    """By the operation's name and the sizes of its operands."""
    sizes = {
        size for shape in shapes for size in (shape if isinstance(shape, list | tuple) else ()) if isinstance(size, int)
    }
    name = operation.lower()
    if any(word in name for word in ("attention", "attn", "flash", "flex")):
        return "attention"
    if any(word in name for word in ("adam", "foreach", "optimizer", "multi_tensor")):
        return "optimizer"
    if vocabulary in sizes:
        return "head"
    if "memcpy" in name or name in ("aten::copy_", "aten::_to_copy"):
        return "copies"
    if "index" in name:
        return "key gather"
    if intermediate_size in sizes:
        return "MLP"
    if any(word in name for word in ("::mm", "addmm", "matmul", "linear", "bmm")):
        return "projections"
    return "the rest"


def _matmul_rate(setting: Setting) -> float:
    """FLOP/s of a large square matmul: the best this GPU achieves, next to the datasheet value."""
    n = 256 if setting.tiny else 8192
    a, b = (torch.randn(n, n, device=setting.device, dtype=setting.dtype) for _ in range(2))
    return 2 * n**3 / median_seconds(setting, lambda: a @ b)
