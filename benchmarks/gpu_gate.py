"""The correctness gate of gpu.py: compares what the device computes with float32 and float64."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_harness import (
    OBJECTIVE,
    OURS,
    PADDED,
    UNSHARED,
    Deadline,
    Setting,
    Trainer,
    rows_of,
    switched,
    to_device,
)
from benchmarks.gpu_images import image_trainers, with_images
from orpo_dist.loss import Objective
from orpo_dist.model.attention.kernels import TRIAL_TOLERANCES, KernelCase, trial_error, trusted_kernel
from orpo_dist.model.attention.sequences import explicit_attention
from orpo_dist.model.head.chunks import PairRows
from orpo_dist.model.head.fused_loss import fused_orpo_loss
from orpo_dist.model.loading.vision import is_vision_language
from orpo_dist.packing.lengths import PairLengths

HEAD_TOLERANCE = 1e-2
# Allowed ratio of the packed layout's bfloat16 error to the padded layout's.
FAMILY_FACTOR, FAMILY_SLACK = 1.5, 2e-3
IMAGE_SIDE = 12  # patches: 36 tokens, in windows of 16 that do not fit


def kernels(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """For each kind of layer: the kernel selected on this device, and its error against float64."""
    rows = []
    sizes = (16,) if setting.tiny else (64, 128, 256)
    for size in sizes:
        for heads in ((4, 4), (8, 2)):
            for extras in (
                (),
                ("windowed",),
                ("softcap",),
                ("softcap", "windowed"),
                ("sinks", "windowed"),
                ("prompt_blocks",),
            ):
                case = KernelCase(
                    device=_indexed(setting.device),
                    dtype=torch.bfloat16,
                    query_heads=heads[0],
                    key_heads=heads[1],
                    head_size=size,
                    value_size=size,
                    dropout=False,
                    **{name: name in extras for name in ("windowed", "softcap", "sinks", "prompt_blocks")},
                )
                trusted = trusted_kernel(case)
                error = trial_error(explicit_attention if trusted is None else trusted.kernel, case)
                rows.append(
                    {
                        "case": str(case),
                        "kernel": "sequence by sequence" if trusted is None else trusted.name,
                        "error": error,
                        "ok": error <= TRIAL_TOLERANCES[case.dtype]
                        and (trusted is not None or setting.device.type == "cpu"),
                    }
                )
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def head(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """The fused head in bfloat16 against float64 on the same bfloat16 inputs: open and closed chunks,
    frozen and trained."""
    width, vocabulary = (32, 97) if setting.tiny else (1024, 32000)
    pairs = [PairRows(40, 70, 90), PairRows(0, 1, 300), PairRows(9, 5, 3)]
    rows = sum(p.nll_prompt + p.chosen + p.rejected for p in pairs)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(setting.device, torch.bfloat16)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(setting.device, torch.bfloat16)
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(setting.device)
    results = []
    for chunk in (None, 64):
        for trained in (False, True):
            found = _head_numbers(hidden, weight, targets, pairs, trained, chunk)
            exact = _head_numbers(hidden.double(), weight.double(), targets, pairs, trained, chunk)
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
            results.append(
                {
                    "case": f"{'trained' if trained else 'frozen'}, {chunk or 'default'} rows a chunk",
                    "error": max(errors),
                    "ok": max(errors) <= HEAD_TOLERANCE,
                }
            )
    return {"ok": all(row["ok"] for row in results), "rows": results}


def _head_numbers(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    pairs: list[PairRows],
    trained: bool,
    chunk: int | None,
) -> list[torch.Tensor]:
    hidden = hidden.detach().requires_grad_()
    weight = weight.detach().requires_grad_(trained)
    ones = torch.ones(len(pairs), device=hidden.device)
    loss = fused_orpo_loss(hidden, weight, targets, pairs, ones, OBJECTIVE, chunk_rows=chunk).loss
    inputs = [hidden, weight] if trained else [hidden]
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


# ---------------------------------------------------------------- families


def _families(tiny: bool) -> dict[str, Callable[[], t.PreTrainedModel]]:
    width = 64 if tiny else 512
    common = dict(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attention_dropout=0.0,
    )
    size = 16 if tiny else 64
    mixed = ["sliding_attention", "full_attention"] * 2
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=96, num_heads=2, out_hidden_size=width, patch_size=14,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    half = width // common["num_attention_heads"] // 2
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half // 4, half // 4, half // 2]}
    # With the usual weights, narrow layers depend very little on positions: wrong image positions would pass.
    mrope = {"rope_parameters": rope, "initializer_range": 0.08 if tiny else 0.02}
    images = dict(image_token_id=990, video_token_id=991, vision_start_token_id=992, vision_end_token_id=993)
    return {
        "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**common, head_dim=size)),
        "Qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**common, head_dim=size)),
        "Gemma 2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**common, head_dim=size, sliding_window=64, layer_types=mixed, query_pre_attn_scalar=size)
        ),
        "Qwen2.5-VL": lambda: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(text_config={**common, **mrope}, vision_config=vision, **images)
        ),
        "Qwen3.5": lambda: t.Qwen3_5ForCausalLM(
            t.Qwen3_5TextConfig(**common, head_dim=size, linear_num_key_heads=2, linear_num_value_heads=2,
                                linear_key_head_dim=size, linear_value_head_dim=size)
        ),
    }  # fmt: skip


def _family_rows(tiny: bool) -> list[dict[str, Any]]:
    scale = 8 if tiny else 1
    triples = ((300, 120, 200), (40, 250, 30), (150, 1, 170), (1, 60, 90))
    return rows_of([PairLengths(*(max(1, n // scale) for n in triple)) for triple in triples], 900)


def families(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """Loss and gradients of each family in bfloat16, packed, against float32 in TRL's padded layout.

    The padded layout in bfloat16 has its own error against float32; that of the packed layout may not be much larger.
    Prompts of a vision-language model begin with an image.
    """
    results = []
    for name, build in _families(setting.tiny).items():
        torch.manual_seed(0)
        with setting.device:
            model = build()
        model = model.to(setting.device).train()
        rows = _family_rows(setting.tiny)
        if is_vision_language(model.config):  # images need the shared prompt, so there are no unshared rows
            rows = with_images(rows, model.config, IMAGE_SIDE)
            *ours, padded = image_trainers(model)
        else:
            ours, padded = [OURS, UNSHARED], PADDED
        exact = _numbers(setting, model, padded, rows, autocast=False)
        single = _numbers(setting, model, ours[0], rows, autocast=False)
        half = {t.name: _numbers(setting, model, t, rows, autocast=True) for t in (*ours, padded)}
        bound = FAMILY_FACTOR * _error(half[padded.name], exact) + FAMILY_SLACK
        errors = {f"{trainer} bf16": _error(numbers, exact) for trainer, numbers in half.items()}
        errors["ours float32"] = _error(single, exact)
        ok = all(errors[f"{trainer.name} bf16"] <= bound for trainer in ours)
        results.append({"case": name, "errors": errors, "bound": bound, "ok": ok and errors["ours float32"] <= 5e-3})
    return {"ok": all(row["ok"] for row in results), "rows": results}


def _numbers(
    setting: Setting, model: nn.Module, trainer: Trainer, rows: list[dict[str, Any]], autocast: bool
) -> list[torch.Tensor]:
    """The loss, and all gradients in one vector."""
    with switched(model, trainer):
        batch = to_device(trainer.collate(rows), setting.device)
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=autocast):
            loss = trainer.loss(model, batch)
        loss.backward()
    gradients = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return [loss.detach().float(), gradients]


def _error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, exact, strict=True))


# ---------------------------------------------------------------- host reads


class _HostReads(TorchDispatchMode):
    """A CPU approximation of set_sync_debug_mode on a GPU."""

    OPERATIONS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.OPERATIONS:
            raise RuntimeError(f"{func} reads from the device")
        return func(*args, **(kwargs or {}))


def syncs(setting: Setting, deadline: Deadline) -> dict[str, Any]:
    """Forward and backward of each family with synchronising calls turned into errors, after one warm-up step.

    Without images: transformers' vision towers read the images' grids on the host.
    """
    results = []
    rows = _family_rows(setting.tiny)
    for name, build in _families(setting.tiny).items():
        torch.manual_seed(0)
        with setting.device:
            model = build()
        model = model.to(setting.device, torch.bfloat16 if setting.device.type == "cuda" else torch.float32).train()
        with switched(model, OURS):
            for guarded in (False, True):
                batch = to_device(OURS.collate(rows), setting.device)
                setting.synchronize()
                found = _guarded_step(setting, model, batch, guarded)
        results.append({"case": name, "sync": found, "ok": found is None})
    return {"ok": all(row["ok"] for row in results), "rows": results}


def _guarded_step(setting: Setting, model: nn.Module, batch: dict[str, Any], guarded: bool) -> str | None:
    try:
        if not guarded:
            OURS.loss(model, batch).backward()
        elif setting.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            OURS.loss(model, batch).backward()
        else:
            with _HostReads():
                OURS.loss(model, batch).backward()
    except RuntimeError as error:
        if not guarded:
            raise
        return str(error).strip().partition("\n")[0]
    finally:
        if setting.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return None


__all__ = ["Objective", "families", "head", "kernels", "syncs"]
