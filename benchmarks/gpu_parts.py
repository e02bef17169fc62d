"""The parts of gpu.py, one function each: `python -m benchmarks.gpu_parts NAME SETTINGS.json` prints a line of JSON.

Every part runs in its own process, which isolates its memory and its failures, and ends by its deadline.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from logging import StreamHandler, getLogger
from typing import Any

import torch
from torch import nn
from transformers import logging
from transformers.integrations.liger import apply_liger_kernel

from benchmarks import gpu_gate, gpu_micro
from benchmarks.gpu_harness import (
    OURS,
    PADDED,
    TRL_DEFAULT,
    UNSHARED,
    Deadline,
    Setting,
    Trainer,
    build_model,
    compare,
    grouped_batches,
    real_lengths,
    shuffled_batches,
    static_bytes,
    trl_best,
)
from benchmarks.gpu_images import build_image_model, image_pairs, image_trainers
from benchmarks.gpu_profile import profile
from orpo_dist.config import without_loss_kernels
from orpo_dist.model.packed.compile import compile_blocks
from orpo_dist.packing.lengths import PairLengths, sharing_gain

MICRO_BATCHES = (8, 4, 2, 1)  # pairs; the first size that fits for all trainers


@dataclass(frozen=True)
class Part:
    name: str
    about: str
    run: Callable[[Setting, Deadline], dict[str, Any]]


def _throughput(shape: str, lora: bool, batches: int) -> Callable[[Setting, Deadline], dict[str, Any]]:
    def run(setting: Setting, deadline: Deadline) -> dict[str, Any]:
        needed = _static_estimate(shape, lora)
        if setting.device.type == "cuda" and not setting.tiny:
            total = torch.cuda.get_device_properties(setting.device).total_memory
            if 1.25 * needed > total:
                return {"skipped": f"weights, gradients and AdamW's moments take {needed / 2**30:.0f} GiB here"}
        model = build_model(setting, shape, lora=lora)
        trainers = [OURS, TRL_DEFAULT, trl_best(), UNSHARED, PADDED]
        return _compared(setting, model, trainers, real_lengths(setting), batches, deadline)

    return run


def _compared(
    setting: Setting,
    model: nn.Module,
    trainers: Sequence[Trainer],
    lengths: Sequence[PairLengths],
    batches: int,
    deadline: Deadline,
    rows: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The trainers at the largest micro-batch that fits in memory for all of them, and the size of that micro-batch."""
    result: dict[str, Any] = {}
    for size in MICRO_BATCHES:
        picked = shuffled_batches(lengths, batches, size)
        result = compare(setting, model, trainers, lengths, picked, deadline=deadline, rows=rows)
        if not any("failed" in figures for figures in result.values()) or deadline.left < 60:
            break
    used = [lengths[i] for batch in picked for i in batch]
    return {
        "micro_batch": size,
        "pairs": len(used),
        "static_bytes": static_bytes(model),
        "tokens": {
            "shared": sum(pair.shared_tokens for pair in used),
            "padded": sum(_padded_tokens([lengths[i] for i in batch]) for batch in picked),
            "padded, grouped": sum(
                _padded_tokens([lengths[i] for i in batch]) for batch in grouped_batches(picked, lengths)
            ),
            "sharing_gain": sharing_gain(used),
        },
        "trainers": result,
    }


def images(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """Pairs with four fifths image tokens."""
    model, batches = build_image_model(setting), 2
    lengths, rows = image_pairs(setting, model, batches * MICRO_BATCHES[0])
    return _compared(setting, model, image_trainers(model), lengths, batches, deadline, rows)


def _static_estimate(shape: str, lora: bool) -> int:
    parameters = {"qwen3-1.7b": 1.72e9, "qwen3-8b": 8.19e9}[shape]
    return int(2 * parameters * (1 if lora else 4))


def _padded_tokens(pairs: list[PairLengths]) -> int:
    return 2 * len(pairs) * max(pair.prompt + max(pair.chosen, pair.rejected) for pair in pairs)


def grid(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """Pairs of one length at a time: the gain from sharing by prompt and completion length."""
    model = build_model(setting, "qwen3-1.7b", lora=True)
    scale = 32 if setting.tiny else 1
    rows = []
    for prompt in (512,) if setting.tiny else (128, 512, 2048):
        for completion in (64, 1024) if setting.tiny else (64, 256, 1024):
            if deadline.left < 20:
                break
            lengths = [PairLengths(prompt // scale, max(1, completion // scale), max(1, completion // scale))] * 8
            size = max(1, min(8, 8192 * 2 // (2 * (prompt + completion))))
            picked = shuffled_batches(lengths, 1, size)
            figures = compare(setting, model, [OURS, PADDED, TRL_DEFAULT], lengths, picked, deadline=deadline, rounds=2)
            rows.append({"prompt": prompt, "completion": completion, "micro_batch": size, "trainers": figures})
    return {"rows": rows}


def options(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """The 8B-shaped LoRA run with compiled blocks, Liger's kernels and without activation checkpointing."""
    lengths = real_lengths(setting)
    picked = shuffled_batches(lengths, 2, 4)
    liger = find_spec("liger_kernel") is not None and setting.device.type == "cuda"
    result: dict[str, Any] = {}
    for kernels in ("plain", "compiled", *(("liger",) if liger else ())):
        for checkpointing in (True, False):
            if deadline.left < 40:
                break
            model = build_model(setting, "qwen3-8b", lora=True, checkpointing=checkpointing)
            if kernels == "compiled":
                compile_blocks(model, backend="aot_eager" if setting.tiny else "inductor")
            if kernels == "liger":
                apply_liger_kernel(model, without_loss_kernels(None))
            figures = compare(setting, model, [OURS], lengths, picked, deadline=deadline, rounds=2)["ours"]
            name = f"{kernels}, {'with' if checkpointing else 'without'} checkpointing"
            result[name] = {**figures, "note": "ours"}
            del model
    return {"trainers": result}


PARTS = (
    Part("gate-kernels", "attention kernels against float64, values and gradients", gpu_gate.kernels),
    Part("gate-head", "the fused head in bfloat16 against float64", gpu_gate.head),
    Part("gate-families", "five families in bfloat16, packed, against float32, padded", gpu_gate.families),
    Part("gate-syncs", "no call in a micro-step waits for the device", gpu_gate.syncs),
    Part("8b-lora", "Qwen3-8B's shape, LoRA, real lengths", _throughput("qwen3-8b", True, 2)),
    Part("1.7b-full", "Qwen3-1.7B's shape, all weights, real lengths", _throughput("qwen3-1.7b", False, 4)),
    Part("images", "Qwen2.5-VL-7B's shape, LoRA, image-heavy pairs", images),
    Part("head", "the loss head at 8192 x 4096 x 151936 against bare matmuls", gpu_micro.head),
    Part("profile", "where a step of the 8B-shaped LoRA run goes", profile),
    Part("options", "torch_compile, Liger, no checkpointing, on the 8B-shaped LoRA run", options),
    Part("attention", "attention kernels of one layer, and the gather of shared keys", gpu_micro.attention),
    Part("1.7b-lora", "Qwen3-1.7B's shape, LoRA, real lengths", _throughput("qwen3-1.7b", True, 4)),
    Part("8b-full", "Qwen3-8B's shape, all weights, real lengths", _throughput("qwen3-8b", False, 2)),
    Part("grid", "prompt and completion lengths", grid),
    Part("packing", "what collation costs beside a step", gpu_micro.packing),
)


def main() -> None:
    name, path = sys.argv[1:]
    with open(path) as file:
        settings = json.load(file)
    logging.set_verbosity_error()
    logger = getLogger("orpo_dist")  # the log says which kernel is selected and why others are not
    logger.setLevel("INFO")
    logger.addHandler(StreamHandler())
    part = next(part for part in PARTS if part.name == name)
    setting = Setting(torch.device(settings["device"]), settings["tiny"])
    result = part.run(setting, Deadline(settings["seconds"]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
