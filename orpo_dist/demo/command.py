"""`orpo-dist demo`: trains an adapter for a small model on a synthetic support data set, end to end."""

import argparse
import os
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_dist.demo.model import find_model
from orpo_dist.demo.support_set import HELD_OUT_PAIRS, TRAINING_PAIRS, make_support_set, write_support_set

if TYPE_CHECKING:
    from orpo_dist.recipe.recipe import Recipe
    from orpo_dist.run.summary import RunSummary

OUTPUT_DIR = "runs/demo"
REPLIES = 2
REPLY_TOKENS = 72
METRICS = (
    ("rewards/accuracies", "preference accuracy"),
    ("rewards/margins", "reward margin"),
    ("nll_loss", "NLL per token"),
)
WRITTEN = (
    ("adapter_model.safetensors", "the trained LoRA adapter; `orpo-dist merge` joins it with its base"),
    ("run_summary.json", "the figures above and more"),
    ("log.jsonl", "every logging event"),
    ("recipe.yaml", "the settings; `orpo-dist train` with this file repeats the run"),
    ("data/", "the pairs"),
)


def main(argv: Sequence[str]) -> int:
    """Runs the demo and prints its effect on the model. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="orpo-dist demo",
        allow_abbrev=False,
        description="Train SmolLM2-135M-Instruct with LoRA on a synthetic customer-support set, on CPU or GPU.",
    )
    parser.add_argument("--output-dir", default=OUTPUT_DIR, help="everything is written here (default: %(default)s)")
    parser.add_argument("--model", help="another chat model, a folder or a name on the hub")
    parser.add_argument("--training-pairs", type=int, default=TRAINING_PAIRS, help="default: %(default)s")
    parser.add_argument("--held-out-pairs", type=int, default=HELD_OUT_PAIRS, help="default: %(default)s")
    options = parser.parse_args(argv)

    # Silence notices of the libraries (renamed options, no GPU for DeepSpeed), which would hide the demo's output.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_gpu() else "cpu")
    warnings.simplefilter("ignore", FutureWarning)
    from orpo_dist.train import train

    started = time.perf_counter()
    folder = Path(options.output_dir)
    support_set = make_support_set(options.training_pairs, options.held_out_pairs)
    write_support_set(folder / "data", support_set)
    print(
        f"{len(support_set.train)} training and {len(support_set.test)} held-out support pairs in {folder / 'data'}. "
        "No held-out pair has a combination of product and issue that was trained on."
    )
    model = options.model or find_model(folder / "base_model")
    prompts = [row["prompt"] for row in support_set.test[:REPLIES]]
    before = replies(model, prompts)
    summary = train(demo_recipe(model, folder))
    after = replies(model, prompts, adapter=folder)

    for prompt, first, second in zip(prompts, before, after, strict=True):
        print()
        for speaker, text in (("customer", prompt[-1]["content"]), ("before", first), ("after", second)):
            print(textwrap.fill(f"{speaker + ':':<10}{text}", 110, subsequent_indent=" " * 10))
    print(f"\n{_comparison(summary)}\n")
    minutes = (time.perf_counter() - started) / 60
    print(f"Took {minutes:.1f} minutes on {summary.device}. Everything is in {folder}/:")
    for name, what in WRITTEN:
        print(f"  {name:<28}{what}")
    return 0


def _comparison(summary: "RunSummary") -> str:
    before, after = summary.eval_before or {}, summary.eval_after or {}
    lines = [f"{summary.eval_pairs} held-out pairs, before and after training on {summary.pairs}:"]
    lines += [f"  {title:<22}{before[name]:>9.4f}  ->{after[name]:>9.4f}" for name, title in METRICS]
    return "\n".join(lines)


def demo_recipe(model: str, folder: Path) -> "Recipe":
    """The demo's recipe, for what `model` names and the data in `folder`/data."""
    from orpo_dist.recipe.recipe import Recipe

    return Recipe.from_mapping(
        {
            "model_name_or_path": model,
            "use_peft": True,
            "lora_dropout": 0.0,  # drawing its random numbers took 40% of a bfloat16 step on a CPU
            "dataset_name": str(folder / "data"),
            "dataset_test_split": "test",
            "output_dir": str(folder),
            "max_length": 256,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 8,
            "learning_rate": 8e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 4,
            "beta": 0.5,
            "gradient_checkpointing": False,
            "logging_steps": 5,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": False,  # off by default with a quiet transformers
            "use_cpu": not has_gpu(),
            **({"bf16": True} if fast_bfloat16() else {}),
        }
    )


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def fast_bfloat16() -> bool:
    """Whether bfloat16 is faster than float32 here: on every recent GPU, and on a CPU with matrix units for it."""
    import torch

    if has_gpu():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def replies(model: str, prompts: list[list[dict[str, str]]], adapter: Path | None = None) -> list[str]:
    """Greedy replies to message lists, by the base model or with a trained adapter."""
    import torch
    from peft import PeftModel

    from orpo_dist.model.loading.load import load_model
    from orpo_dist.model.loading.processor import load_processing_class, tokenizer_of

    tokenizer = tokenizer_of(load_processing_class(model))
    tokenizer.padding_side = "left"
    rendered = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) for prompt in prompts]
    device = torch.device("cuda" if has_gpu() else "cpu")
    inputs = tokenizer(rendered, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
    network: Any = load_model(model, dtype=torch.bfloat16 if fast_bfloat16() else torch.float32)
    if adapter is not None:
        network = PeftModel.from_pretrained(network, str(adapter))
    network.to(device).eval()
    with torch.no_grad():
        output = network.generate(
            **inputs, max_new_tokens=REPLY_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    completions = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in completions]
