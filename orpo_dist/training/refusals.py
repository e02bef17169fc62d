"""Argument checks of ORPOTrainer, before any model is loaded."""

from collections.abc import Iterator
from typing import Any

from peft import PeftModel, PrefixTuningConfig, PromptLearningConfig
from transformers.utils import is_liger_kernel_available

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Sharding, asked_fsdp_version
from orpo_dist.distributed.log import get_logger
from orpo_dist.errors import UserError

logger = get_logger(__name__)


def refuse_contradictions(args: ORPOConfig, model: Any, model_init: Any, has_rows: bool) -> None:
    """Raises UserError for contradicting arguments of the trainer."""
    if not has_rows:
        raise UserError("train_dataset is missing: pass rows of preference pairs.")
    if (model is None) == (model_init is None):
        raise UserError("Pass either model or model_init, and not both.")
    if not isinstance(model, str) and args.model_init_kwargs:
        raise UserError("model_init_kwargs needs a model name or path; this model is already instantiated.")


def refuse_prompt_learning(peft_config: Any, model: Any, gradient_checkpointing: bool) -> None:
    """Raises UserError for adapters that add tokens to the sequence: a row of logits would no longer be that of a token
    of the pair. Prefix tuning adds keys and values alone, and runs in the padded layout, without checkpointing: that
    drops the cache in which they are.
    https://huggingface.co/docs/peft/conceptual_guides/prompting"""
    configs = [peft_config, *(model.peft_config.values() if isinstance(model, PeftModel) else ())]
    for config in configs:
        if isinstance(config, PromptLearningConfig) and not isinstance(config, PrefixTuningConfig):
            raise UserError(
                f"{type(config).__name__} cannot be trained here: prompt tuning and p-tuning put virtual tokens in "
                "front of the prompt, which shifts every row of logits. Use LoRA, or PrefixTuningConfig."
            )
        if isinstance(config, PrefixTuningConfig) and gradient_checkpointing:
            raise UserError(
                "Prefix tuning needs gradient_checkpointing=false: its keys and values are in the cache, which "
                "checkpointing drops."
            )


def refuse_what_needs_logits(args: ORPOConfig, preprocess_logits_for_metrics: Any) -> None:
    """Raises UserError for options that would gather logits or have a different meaning here."""
    reason = "compute_metrics receives per-pair log-probabilities; logits are never gathered"
    if preprocess_logits_for_metrics is not None:
        raise UserError(f"preprocess_logits_for_metrics cannot be used: {reason}.")
    if args.batch_eval_metrics:
        raise UserError(f"batch_eval_metrics cannot be used: {reason}, and they are computed over the whole set.")
    if args.include_for_metrics:
        raise UserError(f"include_for_metrics={args.include_for_metrics} cannot be used: {reason}.")
    if args.label_smoothing_factor:
        raise UserError("label_smoothing_factor smooths token labels, not preferences: use label_smoothing.")


def refuse_unsupported_parallelism(args: ORPOConfig) -> None:
    """Raises UserError for anything but data parallelism, and for a batch size search on several ranks."""
    parallelism = args.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise UserError(
            "Tensor, context and sequence parallelism are not supported: torch's context parallelism strips attention "
            "masks. Use data parallelism (DDP, ZeRO, FSDP2)."
        )
    if asked_fsdp_version(args) == 1:
        raise UserError(
            "FSDP1 is not supported: it flattens the weights that the loss head reads, and transformers is dropping "
            "it. Set fsdp_version: 2 in the accelerate config (a config without it means 1), or fsdp_config version 2."
        )
    if args.auto_find_batch_size and args.world_size > 1:
        raise UserError(
            "auto_find_batch_size works in one process only: with ZeRO-3, FSDP2 or several ranks, one rank that runs "
            "out of memory leaves the others waiting in a collective. Set per_device_train_batch_size and "
            "gradient_accumulation_steps instead."
        )


def refuse_to_wrap_again(sharding: Sharding, wrapped_by: str | None) -> None:
    """Raises UserError where DeepSpeed or FSDP2 has wrapped the model already: neither wraps a model twice."""
    if wrapped_by is not None and sharding is not Sharding.REPLICATED:
        raise UserError(
            f"train() after {wrapped_by} is not possible with {_name(sharding)}, which has wrapped the model for good. "
            "Evaluate first with eval_on_start=true; to train on, save the model and make a new trainer, or raise "
            "num_train_epochs and resume."
        )


def refuse_to_evaluate_first(sharding: Sharding) -> None:
    """Raises UserError where a model cannot be evaluated before train() has wrapped it: ZeRO's stages below 3 and FSDP2
    wrap it together with its optimizer."""
    if sharding not in (Sharding.REPLICATED, Sharding.ZERO3):
        raise UserError(
            f"evaluate() and predict() before train() are not possible with {_name(sharding)}, which wraps the model "
            "together with its optimizer. Set eval_on_start=true for an evaluation before the first step, or evaluate "
            "in a process of its own without it."
        )


def _name(sharding: Sharding) -> str:
    return "FSDP2" if sharding is Sharding.FSDP else f"ZeRO-{sharding.value.removeprefix('zero')}"


def refuse_missing_kernels(args: ORPOConfig, sharding: Sharding) -> None:
    """Raises UserError for kernels that are not installed or have no device, and for compiled blocks under ZeRO-3."""
    if args.torch_compile and sharding is Sharding.ZERO3:
        raise UserError(
            "torch_compile does not work with ZeRO-3, whose hooks gather the weights inside the blocks: "
            "leave it unset, or use ZeRO-2 or FSDP2."
        )
    if not args.use_liger_kernel:
        return
    if not is_liger_kernel_available():
        raise UserError(
            "use_liger_kernel=true needs liger-kernel, which is not installed: pip install 'orpo-dist[liger]'."
        )
    if args.device.type == "cpu":
        raise UserError(
            "use_liger_kernel=true needs a GPU: Liger's kernels are written in Triton. Leave it unset on a CPU."
        )


def warn_without_liger_kernels(model: Any, args: ORPOConfig) -> None:
    """Liger does nothing for an unknown model type and logs that at level INFO only."""
    if not args.use_liger_kernel:
        return
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.warning("use_liger_kernel has no effect: Liger has no kernels for %s.", model.config.model_type)


def refuse_ignored_options(args: ORPOConfig) -> None:
    """Raises UserError for a value of transformers' options that would have no effect here."""
    for option, asked, reason in (*_ignored(args), *_ignored_of_accelerator(args.accelerator_config)):
        if asked:
            raise UserError(f"{option} cannot be used: {reason}.")


def _ignored(args: ORPOConfig) -> Iterator[tuple[str, Any, str]]:
    """Option, whether it was asked for, and why it cannot be."""
    yield (
        "train_sampling_strategy=group_by_length",
        args.train_sampling_strategy == "group_by_length",
        "global batches are drawn first, and pairs of like cost share a micro-batch without padding. Use random, "
        "sequential or batch_rebalance",
    )
    yield (
        "length_column_name",
        args.length_column_name != "length",
        "the cost of a pair is counted from its tokens. Drop it",
    )
    yield (
        "average_tokens_across_devices=False",
        not args.average_tokens_across_devices,
        "the loss is normalised by the tokens of all ranks. Leave it unset",
    )
    yield "label_names", args.label_names is not None, "pairs have no labels. Drop it"
    yield (
        "eval_do_concat_batches=False",
        not args.eval_do_concat_batches,
        "predictions come in the order of the evaluation set, whose batches depend on the ranks. Leave it unset",
    )
    yield (
        "dataloader_in_order=False",
        not args.dataloader_in_order,
        "micro-batches of one global batch would end up in another. Leave it unset",
    )
    yield (
        "enable_jit_checkpoint",
        args.enable_jit_checkpoint,
        "a run saves a checkpoint when it is asked to stop, on all ranks together. Drop it",
    )
    yield (
        "save_on_each_node",
        args.save_on_each_node,
        "a checkpoint is written once, into a folder that all nodes share. Drop it",
    )


def _ignored_of_accelerator(config: Any) -> Iterator[tuple[str, Any, str]]:
    yield (
        "accelerator_config.split_batches",
        config.split_batches,
        "per_device_train_batch_size counts the pairs of one rank. Drop it",
    )
    yield "accelerator_config.dispatch_batches", config.dispatch_batches, "every rank reads its own pairs. Drop it"
    yield (
        "accelerator_config.even_batches=False",
        not config.even_batches,
        "every rank has the same number of micro-batches, and no pair counts twice. Leave it unset",
    )


def refuse_empty_epoch(args: ORPOConfig, pairs: int, global_batch: int) -> None:
    """Raises UserError where dataloader_drop_last leaves no step."""
    if args.dataloader_drop_last and pairs < global_batch:
        raise UserError(
            f"dataloader_drop_last leaves no step: {pairs} training pairs are fewer than a global batch of "
            f"{global_batch}. Unset it, or lower per_device_train_batch_size or gradient_accumulation_steps."
        )


def no_evaluation_rows() -> UserError:
    return UserError("Evaluation needs rows: pass eval_dataset to the trainer or to evaluate().")
