"""One run, from a recipe to a folder: rows, audit, model, training with an evaluation before and after, reports.

    orpo-dist train RECIPE.yaml [--field value ...]

in one process, or in each of the processes that torchrun, accelerate launch or srun starts.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from orpo_dist.errors import UserError
from orpo_dist.recipe import DataArguments, Recipe

# The libraries read variables such as HF_HOME when they are imported, and the recipe may set them: see recipe.py.
if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orpo_dist.config import ORPOConfig
    from orpo_dist.data.prepare import PreparedPairs
    from orpo_dist.model.load import ModelArguments
    from orpo_dist.runtime.report import RunLog, RunSummary
    from orpo_dist.trainer import ORPOTrainer


@dataclass(frozen=True)
class RunPairs:
    """Tokenised pairs of a run."""

    train: "PreparedPairs"
    evaluation: "PreparedPairs | None"


def main(argv: Sequence[str]) -> int:
    """`orpo-dist train`. Returns 0 when the run has finished."""
    recipe = Recipe.parse(argv)
    train(recipe)
    from accelerate import PartialState

    PartialState().destroy_process_group()
    return 0


def train(recipe: Recipe) -> "RunSummary":
    """Train as the recipe says and write the run's folder. Every rank calls it and gets the same summary.

    Credentials in the recipe are moved to the environment, where the libraries look for them.

    Raises:
        UserError: data that cannot be trained on, a model that cannot be loaded, options that contradict each other,
            a folder with the checkpoints of another run.
    """
    from accelerate import PartialState
    from transformers import PrinterCallback, ProgressCallback

    from orpo_dist.runtime.hub import check_login, move_token_to_environment
    from orpo_dist.runtime.report import FinalEvaluation, RunLog, ShortProgress
    from orpo_dist.runtime.trackers import tensorboard_folder, usable_trackers
    from orpo_dist.trainer import ORPOTrainer

    args, state = recipe.training, PartialState()
    folder = Path(str(args.output_dir))
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, folder)
    _check_evaluation(recipe)
    move_token_to_environment(args)
    if args.push_to_hub:
        check_login()
    args.report_to = usable_trackers(list(args.report_to or []))
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        recipe.save(folder / "recipe.yaml")

    tokenizer, pairs = _prepare(recipe, folder)
    model = _load_model(recipe.model, args)
    # The first evaluation is the trainer's own: inside the loop the model is wrapped, as ZeRO-1 and ZeRO-2 need.
    # A resumed run has it in its history.
    args.eval_on_start = args.eval_on_start or (pairs.evaluation is not None and checkpoint is None)
    log = RunLog(folder)
    with tensorboard_folder(folder / "tensorboard"):
        trainer = ORPOTrainer(
            model=model,
            args=args,
            train_dataset=pairs.train.dataset,
            eval_dataset=pairs.evaluation.dataset if pairs.evaluation else None,
            processing_class=tokenizer,
            peft_config=_peft_config(recipe.model, model),
            callbacks=[log, FinalEvaluation()] if pairs.evaluation else [log],
        )
    del model
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgress)
    trainer.pop_callback(PrinterCallback)

    if checkpoint is not None and state.is_main_process:
        print(f"Resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    _save_model(trainer, folder)
    merged = _merge(recipe, folder) if recipe.model.merge_adapter and recipe.model.trains_adapter else None
    summary = _summarise(recipe, trainer, pairs, log, merged)
    if state.is_main_process:
        summary.save(folder)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.data.dataset_name, revision=args.hub_revision)
    else:
        trainer.create_model_card(dataset_name=recipe.data.dataset_name)
    if state.is_main_process:
        print(_report(summary))
    return summary


def checkpoint_to_resume(asked: str | None, folder: Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means.

    `auto`: the newest in the run's folder, or a fresh start; `true`: the newest, which must exist; else a path.

    Raises:
        UserError: no such checkpoint, or a fresh start in a folder that holds the checkpoints of another run.
    """
    from transformers.trainer_utils import get_last_checkpoint

    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    word = (asked or "false").lower()
    if word in ("false", "no", "none"):
        if newest is not None:
            raise UserError(
                f"{folder} holds {Path(newest).name} of an earlier run. To continue that run: "
                "--resume_from_checkpoint auto. To start anew: another --output_dir, or remove the folder."
            )
        return None
    if word == "auto":
        return newest
    if word == "true":
        if newest is None:
            raise UserError(
                f"resume_from_checkpoint=true, but {folder} holds no checkpoint. `auto` starts a fresh run then."
            )
        return newest
    if not (Path(str(asked)) / "trainer_state.json").is_file():
        raise UserError(f"resume_from_checkpoint={asked} is no checkpoint: it holds no trainer_state.json.")
    return asked


def load_splits(data: DataArguments, seed: int) -> tuple[Any, Any]:
    """Rows to train on, and rows to evaluate on or None.

    Raises:
        UserError: a split of a single file, which would be the training rows again, or too few rows to hold some out.
    """
    from orpo_dist.data.sources import load_rows

    if data.dataset_test_split is not None and Path(str(data.dataset_name)).is_file():
        raise UserError(
            f"{data.dataset_name} is one file and has no split {data.dataset_test_split!r} to evaluate on. Leave "
            "dataset_test_split out and hold rows out with test_split_size=0.1, or give a folder with a file per split."
        )

    def rows_of(split: str) -> Any:
        return load_rows(
            str(data.dataset_name),
            split=split,
            config=data.dataset_config,
            streaming=data.dataset_streaming,
            max_samples=data.max_samples,
        )

    rows = rows_of(data.dataset_train_split)
    if data.dataset_test_split is not None:
        return rows, rows_of(data.dataset_test_split)
    if data.test_split_size is None:
        return rows, None
    size = data.test_split_size if data.test_split_size < 1 else int(data.test_split_size)
    if size >= len(rows) or size * len(rows) < 1:
        raise UserError(
            f"test_split_size={data.test_split_size} of {len(rows)} rows leaves no row to train on or to evaluate on."
        )
    held_out = rows.train_test_split(test_size=size, seed=seed)
    return held_out["train"], held_out["test"]


def _prepare(recipe: Recipe, folder: Path) -> "tuple[PreTrainedTokenizerBase, RunPairs]":
    from orpo_dist.data.options import PrepareOptions
    from orpo_dist.data.prepare import prepare_pairs
    from orpo_dist.data.tokenize import resolve_chat_template
    from orpo_dist.model.load import load_config, load_processing_class

    name, args = str(recipe.model.model_name_or_path), recipe.training
    source: dict[str, Any] = {"revision": recipe.model.model_revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = load_processing_class(name, **source)
    if args.chat_template is not None:  # the one that is trained is saved with the model
        tokenizer.chat_template = resolve_chat_template(args.chat_template, tokenizer)
    options = PrepareOptions.from_config(args, load_config(name, **source).is_encoder_decoder)
    train_rows, eval_rows = load_splits(recipe.data, args.seed)

    def prepared(rows: Any, split: str) -> "PreparedPairs":
        return prepare_pairs(rows, tokenizer, options, name=split, dropped_rows_path=folder / "dropped_rows.jsonl")

    train_pairs = prepared(train_rows, "train")
    return tokenizer, RunPairs(train_pairs, prepared(eval_rows, "eval") if eval_rows is not None else None)


def _load_model(arguments: "ModelArguments", args: "ORPOConfig") -> "PreTrainedModel | PeftModel":
    """The base model in the precision the run needs; with the adapter that is to be continued, if there is one."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    from orpo_dist.model.adapters import add_adapter
    from orpo_dist.model.load import compute_dtype, load_model, quantization_config, resolve_dtype

    options: dict[str, Any] = {
        "revision": arguments.model_revision,
        "dtype": resolve_dtype(arguments, bf16=args.bf16, fp16=args.fp16),
        "attn_implementation": arguments.attn_implementation,
        "quantization_config": quantization_config(arguments, compute_dtype(args.bf16, args.fp16)),
        "trust_remote_code": args.trust_remote_code,
    }
    # They are used up here; the trainer wants them only beside a model given by name.
    extra, args.model_init_kwargs = args.model_init_kwargs or {}, None
    if not isinstance(extra, dict):
        raise UserError(f"model_init_kwargs={extra!r} is not a mapping, nor a JSON object.")
    model = load_model(str(arguments.model_name_or_path), **(options | extra))
    if arguments.adapter_name_or_path is None:
        return model
    return add_adapter(
        model,
        adapter_name_or_path=arguments.adapter_name_or_path,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs=cast("dict[str, Any] | None", args.gradient_checkpointing_kwargs),
        zero3=is_deepspeed_zero3_enabled(),
    )


def _peft_config(arguments: "ModelArguments", model: "PreTrainedModel | PeftModel") -> "LoraConfig | None":
    from orpo_dist.model.adapters import lora_config

    return lora_config(arguments, is_encoder_decoder=model.config.is_encoder_decoder)


def _check_evaluation(recipe: Recipe) -> None:
    data, args = recipe.data, recipe.training
    if data.dataset_test_split is not None or data.test_split_size is not None:
        return
    for option, wants in (
        ("eval_strategy", args.eval_strategy != "no"),
        ("generate_during_eval", args.generate_during_eval),
        ("load_best_model_at_end", args.load_best_model_at_end),
    ):
        if wants:
            raise UserError(
                f"{option} needs rows to evaluate on: set dataset_test_split to a split, or test_split_size to hold "
                "rows out of the training split."
            )


def _save_model(trainer: "ORPOTrainer", folder: Path) -> None:
    """Model or adapter with tokenizer and generation config, in the standard layout. Every rank takes part."""
    push, trainer.args.push_to_hub = trainer.args.push_to_hub, False  # save_model would push before the report exists
    trainer.save_model(str(folder))
    trainer.args.push_to_hub = push
    model: Any = trainer.model
    if trainer.is_world_process_zero() and model.generation_config is not None:
        # peft saves none. Not save_pretrained: it refuses configs that the base itself came with.
        model.generation_config.to_json_file(folder / "generation_config.json")


def _merge(recipe: Recipe, folder: Path) -> str:
    from accelerate import PartialState

    from orpo_dist.merge import merge_run

    state = PartialState()
    if state.is_main_process:
        gc.collect()
        report = merge_run(folder, trust_remote_code=recipe.training.trust_remote_code)
        print("\n".join(report.lines()))
    state.wait_for_everyone()
    return str(folder / "merged")


def _summarise(
    recipe: Recipe, trainer: "ORPOTrainer", pairs: RunPairs, log: "RunLog", merged: str | None
) -> "RunSummary":
    from transformers.trainer_pt_utils import get_model_param_count

    from orpo_dist.runtime.report import (
        RunSummary,
        device_name,
        evaluation_at,
        pairs_seen,
        peak_memory_gib,
        versions,
        without_prefix,
    )

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


def _report(summary: "RunSummary") -> str:
    speed = f", {summary.pairs_per_second:.1f} pairs/s" if summary.pairs_per_second else ""
    lines = [
        summary.table(),
        f"{summary.pairs} pairs, {summary.global_batch_size} per step, steps: {summary.steps}, processes: "
        f"{summary.world_size}{speed}, peak memory {max(summary.peak_memory_gib):.2f} GiB.",
        f"{'Adapter' if summary.adapter else 'Model'} and reports: {summary.output_dir}",
    ]
    return "\n".join(line for line in lines if line)
