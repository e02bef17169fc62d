"""The end of a run: the model in the standard layout, merged if asked for, and the summary."""

import gc
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.trainer_pt_utils import get_model_param_count

from orpo_dist.data.splits import RunPairs
from orpo_dist.merge import merge_run
from orpo_dist.recipe import Recipe
from orpo_dist.runtime.report import (
    RunLog,
    RunSummary,
    device_name,
    evaluation_at,
    pairs_seen,
    peak_memory_gib,
    versions,
    without_prefix,
)
from orpo_dist.trainer import ORPOTrainer


def save_model(trainer: ORPOTrainer, folder: Path) -> None:
    """Model or adapter with tokenizer and generation config, in the standard layout. Every rank takes part."""
    push, trainer.args.push_to_hub = trainer.args.push_to_hub, False  # save_model would push before the report exists
    trainer.save_model(str(folder))
    trainer.args.push_to_hub = push
    model: Any = trainer.model
    if trainer.is_world_process_zero() and model.generation_config is not None:
        # peft saves none. Not save_pretrained: it refuses configs that the base itself came with.
        model.generation_config.to_json_file(folder / "generation_config.json")


def merge(recipe: Recipe, folder: Path) -> str:
    """Merge the adapter into its base, checked, and return the folder of the result."""
    state = PartialState()
    if state.is_main_process:
        gc.collect()
        done = merge_run(folder, trust_remote_code=recipe.training.trust_remote_code)
        print("\n".join(done.lines()))
    state.wait_for_everyone()
    return str(folder / "merged")


def summarise(recipe: Recipe, trainer: ORPOTrainer, pairs: RunPairs, log: RunLog, merged: str | None) -> RunSummary:
    """What run_summary.json says. Every rank takes part."""
    args, state = trainer.args, trainer.state
    model: Any = trainer.model
    after = evaluation_at(state, state.global_step)
    if pairs.evaluation is not None and (after is None or args.load_best_model_at_end):
        after = without_prefix(trainer.evaluate())
    count = len(pairs.train.dataset)
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    first, last = (
        pairs_seen(step, count, global_batch, args.dataloader_drop_last) for step in (log.first_step, state.global_step)
    )
    return RunSummary(
        model=str(recipe.model.model_name_or_path),
        model_revision=getattr(model.config, "_commit_hash", None),
        dataset=str(recipe.data.dataset_name),
        output_dir=str(args.output_dir),
        adapter=recipe.model.trains_adapter,
        merged_model=merged,
        pairs=count,
        dropped=len(pairs.train.dropped),
        eval_pairs=len(pairs.evaluation.dataset) if pairs.evaluation else 0,
        eval_dropped=len(pairs.evaluation.dropped) if pairs.evaluation else 0,
        steps=state.global_step,
        epochs=round(state.epoch or 0.0, 4),
        global_batch_size=global_batch,
        world_size=args.world_size,
        device=device_name(args.device),
        parameters=get_model_param_count(model),
        trainable_parameters=get_model_param_count(model, trainable_only=True),
        train_loss=next((event["train_loss"] for event in reversed(state.log_history) if "train_loss" in event), None),
        eval_before=evaluation_at(state, 0),
        eval_after=after,
        train_seconds=round(log.train_seconds, 3),
        pairs_per_second=round((last - first) / log.train_seconds, 3) if log.train_seconds else None,
        peak_memory_gib=peak_memory_gib(args.device),
        versions=versions(),
    )


def report(summary: RunSummary) -> str:
    """The last lines on the terminal."""
    speed = f", {summary.pairs_per_second:.1f} pairs/s" if summary.pairs_per_second else ""
    lines = [
        summary.table(),
        f"{summary.pairs} pairs, {summary.global_batch_size} per step, steps: {summary.steps}, processes: "
        f"{summary.world_size}{speed}, peak memory {max(summary.peak_memory_gib):.2f} GiB.",
        f"{'Adapter' if summary.adapter else 'Model'} and reports: {summary.output_dir}",
    ]
    return "\n".join(line for line in lines if line)
