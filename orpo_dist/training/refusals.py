"""Argument checks of ORPOTrainer, before any model is loaded."""

from typing import Any

from transformers.utils import is_liger_kernel_available

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Sharding
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
    if args.auto_find_batch_size and args.world_size > 1:
        raise UserError(
            "auto_find_batch_size works in one process only: with ZeRO-3, FSDP2 or several ranks, one rank that runs "
            "out of memory leaves the others waiting in a collective. Set per_device_train_batch_size and "
            "gradient_accumulation_steps instead."
        )


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


def no_evaluation_rows() -> UserError:
    return UserError("Evaluation needs rows: pass eval_dataset to the trainer or to evaluate().")
