"""One run, from a recipe to a folder: rows, audit, model, training with an evaluation before and after, reports.

    orpo-dist train RECIPE.yaml [--field value ...]

in one process, or in each of the processes that torchrun, accelerate launch or srun starts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from orpo_dist.errors import NonFiniteRun, RunStopped, UserError
from orpo_dist.recipe import Recipe

# The libraries read variables such as HF_HOME when they are imported, and the recipe may set them: see recipe.py.
if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from orpo_dist.config import ORPOConfig
    from orpo_dist.data.prepare import PreparedPairs
    from orpo_dist.data.splits import RunPairs
    from orpo_dist.model.load import ModelArguments
    from orpo_dist.runtime.report import RunSummary


def main(argv: Sequence[str]) -> int:
    """`orpo-dist train`. Returns 0 when the run has finished."""
    recipe = Recipe.parse(argv)
    from orpo_dist.runtime.stop import raising_on_signals

    with raising_on_signals():
        train(recipe)
    from orpo_dist.runtime.ranks import leave_together

    leave_together()
    return 0


def train(recipe: Recipe) -> "RunSummary":
    """Train as the recipe says and write the run's folder. Every rank calls it and gets the same summary.

    Credentials in the recipe are moved to the environment, where the libraries look for them.

    Raises:
        UserError: data that cannot be trained on, a model that cannot be loaded, options that contradict each other,
            a folder with the checkpoints of another run.
        RunStopped, NonFiniteRun, SaveError: see docs/runs.md.
    """
    from accelerate import PartialState
    from transformers import PrinterCallback, ProgressCallback

    from orpo_dist import finish
    from orpo_dist.runtime.hub import check_login, move_token_to_environment
    from orpo_dist.runtime.ranks import let_gloo_finish, on_first_rank
    from orpo_dist.runtime.report import SUMMARY_NAME, FinalEvaluation, RunLog, ShortProgress
    from orpo_dist.runtime.resume import checkpoint_to_resume
    from orpo_dist.runtime.trackers import tensorboard_folder, usable_trackers
    from orpo_dist.trainer import ORPOTrainer

    args, state = recipe.training, PartialState()
    folder = Path(str(args.output_dir))
    checkpoint = on_first_rank(lambda: checkpoint_to_resume(args.resume_from_checkpoint, folder))
    _check_evaluation(recipe)
    move_token_to_environment(args)
    if args.push_to_hub:
        check_login()
    args.report_to = usable_trackers(list(args.report_to or []))
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMMARY_NAME).unlink(missing_ok=True)  # it says that a run has finished, and this one has not
        recipe.save(folder / "recipe.yaml")

    processing_class, pairs = prepare(recipe, folder)
    if state.is_main_process:
        recipe.save(folder / "recipe.yaml")  # with what the processor decided
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
            processing_class=processing_class,
            peft_config=_peft_config(recipe.model, model),
            callbacks=[log, FinalEvaluation()] if pairs.evaluation else [log],
        )
    del model
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgress)
    trainer.pop_callback(PrinterCallback)

    if checkpoint is not None and state.is_main_process:
        print(f"Resuming from {checkpoint}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (RunStopped, NonFiniteRun):
        let_gloo_finish()
        raise
    finish.save_model(trainer, folder)
    merged = finish.merge(recipe, folder) if recipe.model.merge_adapter and recipe.model.trains_adapter else None
    summary = finish.summarise(recipe, trainer, pairs, log, merged)
    if state.is_main_process:
        summary.save(folder)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.data.dataset_name, revision=args.hub_revision)
    else:
        trainer.create_model_card(dataset_name=recipe.data.dataset_name)
    if state.is_main_process:
        print(finish.report(summary))
    return summary


def prepare(recipe: Recipe, folder: Path) -> "tuple[PreTrainedTokenizerBase | ProcessorMixin, RunPairs]":
    """The tokenizer or processor and the tokenised pairs of a run, from the cache where they are there. Raises
    UserError."""
    from orpo_dist.checks import image_sizes, resolve_max_length
    from orpo_dist.data.chat_template import resolve_chat_template
    from orpo_dist.data.options import PrepareOptions
    from orpo_dist.data.prepare import prepare_pairs
    from orpo_dist.data.splits import RunPairs, load_splits
    from orpo_dist.model.load import load_config
    from orpo_dist.model.processor import load_processing_class, tokenizer_of

    name, args = str(recipe.model.model_name_or_path), recipe.training
    source: dict[str, Any] = {"revision": recipe.model.model_revision, "trust_remote_code": args.trust_remote_code}
    processing_class = load_processing_class(name, **source, sizes=image_sizes(args))
    tokenizer = tokenizer_of(processing_class)
    if args.chat_template is not None:  # the one that is trained is saved with the model
        processing_class.chat_template = tokenizer.chat_template = resolve_chat_template(
            args.chat_template, processing_class
        )
    resolve_max_length(args, processing_class)
    options = PrepareOptions.from_config(args, load_config(name, **source).is_encoder_decoder)
    train_rows, eval_rows = load_splits(recipe.data, args.seed)

    def prepared(rows: Any, split: str) -> "PreparedPairs":
        return prepare_pairs(
            rows, processing_class, options, name=split, dropped_rows_path=folder / "dropped_rows.jsonl"
        )

    train_pairs = prepared(train_rows, "train")
    return processing_class, RunPairs(train_pairs, prepared(eval_rows, "eval") if eval_rows is not None else None)


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
