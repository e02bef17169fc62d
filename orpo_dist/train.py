"""One run, from a recipe to its folder: rows, audit, model, training with an evaluation before and after, reports.

    orpo-dist train RECIPE.yaml [--field value ...]

Runs in one process, or in each process started by torchrun, accelerate launch or srun.
"""

import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_dist.errors import NonFiniteRun, RunStopped, UserError
from orpo_dist.options.secrets import without_password
from orpo_dist.recipe.recipe import Recipe

# Imported late: the libraries read variables such as HF_HOME on import, and the recipe may set them (recipe/recipe.py).
if TYPE_CHECKING:
    from orpo_dist.data.splits import RunPairs
    from orpo_dist.run.callbacks import RunLog
    from orpo_dist.run.summary import RunSummary
    from orpo_dist.trainer import ORPOTrainer


def main(argv: Sequence[str]) -> int:
    """`orpo-dist train`. Returns 0 when the run has finished."""
    from orpo_dist.run.stop import raising_on_signals

    with raising_on_signals():
        train(Recipe.parse(argv))  # which imports transformers: seconds, from a slow disk minutes
    from orpo_dist.distributed.ranks import leave_together

    leave_together()
    return 0


def train(recipe: Recipe) -> "RunSummary":
    """Train a recipe and write the run's folder. Every rank calls it and gets the same summary.

    Credentials in the recipe are moved to the environment, where the libraries look for them.

    Raises:
        UserError: data that cannot be trained on, a model that cannot be loaded, contradicting options, or a folder
            with the checkpoints of another run or in which another one trains.
        RunStopped, NonFiniteRun, SaveError: see docs/runs.md.
    """
    from orpo_dist.run.stop import stop_behind

    folder = Path(str(recipe.training.output_dir))
    try:
        return _train(recipe, folder)
    except RunStopped as stop:  # while loading, tokenising or merging it does not know of a checkpoint
        raise stop if stop.checkpoint is not None else _with_newest_checkpoint(stop, folder) from None
    except Exception as error:
        hidden = stop_behind(error)
        if hidden is None:
            raise
        raise _with_newest_checkpoint(hidden, folder) from None


def _train(recipe: Recipe, folder: Path) -> "RunSummary":
    from accelerate import PartialState

    from orpo_dist.distributed.ranks import on_first_rank
    from orpo_dist.run.finished import finished_run
    from orpo_dist.run.owner import owned

    state = PartialState()
    finished = on_first_rank(lambda: finished_run(recipe, folder))
    if finished is not None:
        if state.is_main_process:
            print(_nothing_left(finished))
        return finished
    with owned(folder):
        return _run(recipe, folder)


def _run(recipe: Recipe, folder: Path) -> "RunSummary":
    from accelerate import PartialState

    from orpo_dist.distributed.ranks import let_gloo_finish
    from orpo_dist.run.callbacks import RunLog
    from orpo_dist.run.prepare import prepare
    from orpo_dist.run.stop import heed_signals

    args, state = recipe.training, PartialState()
    checkpoint = _begin(recipe, folder)
    processing_class, pairs = prepare(recipe, folder)
    heed_signals()
    if state.is_main_process:
        recipe.save(folder / "recipe.yaml")  # with what the processor decided
    # The trainer runs the first evaluation inside its loop, where the model is wrapped, as ZeRO-1 and ZeRO-2 need.
    # A resumed run has it in its history.
    args.eval_on_start = args.eval_on_start or (pairs.evaluation is not None and checkpoint is None)
    log = RunLog(folder)
    trainer = _trainer(recipe, folder, processing_class, pairs, log)

    if checkpoint is not None and state.is_main_process:
        print(f"Resuming from {checkpoint}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (RunStopped, NonFiniteRun):
        let_gloo_finish()
        raise
    summary = _last_acts(recipe, trainer, pairs, log)
    if state.is_main_process:
        print(_report(summary))
    return summary


def _with_newest_checkpoint(stop: RunStopped, folder: Path) -> RunStopped:
    from orpo_dist.run.checkpoint import MARKER, checkpoint_folders, step_of

    complete = [checkpoint for checkpoint in checkpoint_folders(folder) if (checkpoint / MARKER).is_file()]
    if not complete:
        return stop
    return RunStopped(stop.reason, step_of(complete[-1]), str(complete[-1]))


def _begin(recipe: Recipe, folder: Path) -> str | None:
    """What can be refused before data is read, and the recipe in the run's folder. Returns the checkpoint to resume
    from. Every rank takes part."""
    from accelerate import PartialState

    from orpo_dist.distributed.log import get_logger
    from orpo_dist.run.hub_login import check_login, move_token_to_environment
    from orpo_dist.run.resume import checkpoint_to_resume
    from orpo_dist.run.summary import SUMMARY_NAME
    from orpo_dist.run.trackers import usable_trackers
    from orpo_dist.run.upload import unstage

    args = recipe.training
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, folder)
    _check_evaluation(recipe)
    _check_packages_and_layers(recipe)
    move_token_to_environment(args)
    if args.push_to_hub:
        check_login()
    if args.save_only_model and args.save_strategy != "no":
        get_logger(__name__).warning(
            "save_only_model: the checkpoints have no optimizer and no random state, so a run that is stopped, killed "
            "or requeued cannot go on from them."
        )
    args.report_to = usable_trackers(list(args.report_to or []))
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        unstage(folder)  # of a run that was killed in its upload
        (folder / SUMMARY_NAME).unlink(missing_ok=True)  # it says that a run has finished, and this one has not
        recipe.save(folder / "recipe.yaml")
    return checkpoint


def _last_acts(recipe: Recipe, trainer: "ORPOTrainer", pairs: "RunPairs", log: "RunLog") -> "RunSummary":
    """Save, merge, evaluate, upload; run_summary.json at the very end says that the run has finished."""
    from orpo_dist.distributed.once import done_by_first_rank

    args, folder, watch = recipe.training, Path(str(recipe.training.output_dir)), trainer.hang_watch
    save = partial(_save_model, trainer, folder)
    with watch.phase("save", "the save of the model"):
        done_by_first_rank(save, meanwhile=save)
    merged = None
    if recipe.model.merge_adapter and recipe.model.trains_adapter:
        with watch.phase("last act", "merging the adapter"):
            merged = _merge(recipe, folder)
    summary = _summarise(recipe, trainer, pairs, log, merged)
    dataset = without_password(str(recipe.data.dataset_name))
    with watch.phase("last act", "the upload" if args.push_to_hub else "the model card and the summary"):
        done_by_first_rank(lambda: summary.prepare(folder))
        if args.push_to_hub:
            push = partial(trainer.push_to_hub, dataset_name=dataset, revision=args.hub_revision)
            done_by_first_rank(push, meanwhile=push)  # it saves the model first, together
        else:
            done_by_first_rank(lambda: trainer.create_model_card(dataset_name=dataset))
        done_by_first_rank(lambda: summary.save(folder))
    return summary


def _trainer(recipe: Recipe, folder: Path, processing_class: Any, pairs: "RunPairs", log: "RunLog") -> "ORPOTrainer":
    """The trainer of the run, with the model that it trains."""
    from transformers import PrinterCallback, ProgressCallback

    from orpo_dist.run.callbacks import FinalEvaluation, LastStep, ShortProgress
    from orpo_dist.run.prepare import load_model_of, peft_config_of
    from orpo_dist.run.step_file import StepFile
    from orpo_dist.run.trackers import tensorboard_folder
    from orpo_dist.trainer import ORPOTrainer

    model = load_model_of(recipe.model, recipe.training)
    with tensorboard_folder(folder / "tensorboard"):
        trainer = ORPOTrainer(
            model=model,
            args=recipe.training,
            train_dataset=pairs.train.dataset,
            eval_dataset=pairs.evaluation.dataset if pairs.evaluation else None,
            processing_class=processing_class,
            peft_config=peft_config_of(recipe.model, model),
            callbacks=[log, FinalEvaluation()] if pairs.evaluation else [log],
        )
    step_file = StepFile.asked_for()
    if step_file is not None:
        trainer.add_callback(LastStep(step_file))
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgress)
    trainer.pop_callback(PrinterCallback)
    return trainer


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


def _check_packages_and_layers(recipe: Recipe) -> None:
    """What the trainer checks too, but only once data and model are there."""
    from orpo_dist.model.loading.wrapped_layers import refuse_unknown_layers
    from orpo_dist.training.packages import refuse_missing_packages

    model, args = recipe.model, recipe.training
    quantization = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)), None)
    refuse_missing_packages(args.optim, model.attn_implementation, quantization)
    refuse_unknown_layers(
        str(model.model_name_or_path), revision=model.model_revision, trust_remote_code=args.trust_remote_code
    )


def _save_model(trainer: "ORPOTrainer", folder: Path) -> None:
    """Save model or adapter with tokenizer and generation config, in the standard layout. Every rank must call it.

    Raises:
        SaveError: on the rank that writes: what lies there could not be loaded.
    """
    from orpo_dist.run.checkpoint import writing

    push, trainer.args.push_to_hub = trainer.args.push_to_hub, False  # save_model would push before the report exists
    with writing("the model", folder):
        trainer.save_model(str(folder))
        model: Any = trainer.model
        if trainer.is_world_process_zero() and model.generation_config is not None:
            # peft does not save it. save_pretrained rejects some configs that base models ship, hence to_json_file.
            model.generation_config.to_json_file(folder / "generation_config.json")
    trainer.args.push_to_hub = push


def _merge(recipe: Recipe, folder: Path) -> str:
    """Merge the adapter into its base, check the result and return its folder."""
    from orpo_dist.distributed.once import done_by_first_rank
    from orpo_dist.model.loading.merge import merge_run

    def merge() -> None:
        gc.collect()
        done = merge_run(folder, trust_remote_code=recipe.training.trust_remote_code)
        print("\n".join(done.lines()))

    done_by_first_rank(merge)
    return str(folder / "merged")


def _summarise(
    recipe: Recipe, trainer: "ORPOTrainer", pairs: "RunPairs", log: "RunLog", merged: str | None
) -> "RunSummary":
    """The content of run_summary.json. Every rank must call it."""
    from transformers.trainer_pt_utils import get_model_param_count

    from orpo_dist.run.machine import device_name, peak_memory_of_ranks, versions
    from orpo_dist.run.summary import RunSummary, evaluation_at, pairs_seen, without_prefix

    args, state = trainer.args, trainer.state
    model: Any = trainer.model
    after = evaluation_at(state, state.global_step)
    if pairs.evaluation is not None and (after is None or args.load_best_model_at_end):
        after = without_prefix(trainer.evaluate())
    count = len(pairs.train.dataset)
    global_batch = trainer.environment.global_batch(args)
    first, last = (
        pairs_seen(step, count, global_batch, args.dataloader_drop_last) for step in (log.first_step, state.global_step)
    )
    return RunSummary(
        model=str(recipe.model.model_name_or_path),
        model_revision=getattr(model.config, "_commit_hash", None),
        dataset=without_password(str(recipe.data.dataset_name)),
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
        world_size=trainer.environment.world_size,
        device=device_name(args.device),
        parameters=get_model_param_count(model),
        trainable_parameters=get_model_param_count(model, trainable_only=True),
        train_loss=next((event["train_loss"] for event in reversed(state.log_history) if "train_loss" in event), None),
        eval_before=evaluation_at(state, 0),
        eval_after=after,
        train_seconds=round(log.train_seconds, 3),
        pairs_per_second=round((last - first) / log.train_seconds, 3) if log.train_seconds else None,
        peak_memory_gib=peak_memory_of_ranks(args.device),
        versions=versions(),
    )


def _nothing_left(summary: "RunSummary") -> str:
    return (
        f"This run has finished: {summary.output_dir} holds the model of step {summary.steps}, made with this recipe. "
        "Nothing is changed. To train further, raise max_steps or num_train_epochs; to train again, use another "
        "--output_dir."
    )


def _report(summary: "RunSummary") -> str:
    """The last lines on the terminal."""
    speed = f", {summary.pairs_per_second:.1f} pairs/s" if summary.pairs_per_second else ""
    lines = [
        summary.table(),
        f"{summary.pairs} pairs, {summary.global_batch_size} per step, steps: {summary.steps}, processes: "
        f"{summary.world_size}{speed}, peak memory {max(summary.peak_memory_gib):.2f} GiB.",
        f"{'Adapter' if summary.adapter else 'Model'} and reports: {summary.output_dir}",
    ]
    return "\n".join(line for line in lines if line)
