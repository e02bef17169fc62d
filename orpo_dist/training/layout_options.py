"""Layout options derived from the rows of a run: maximum length, prompt sharing, images."""

from collections.abc import Callable
from typing import Any

from transformers import ProcessorMixin

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Environment
from orpo_dist.distributed.log import get_logger
from orpo_dist.errors import UserError
from orpo_dist.images import torchvision
from orpo_dist.loss import Objective
from orpo_dist.model.packed.asked_layout import ImageSetup, LayoutOptions
from orpo_dist.options.model import compute_dtype
from orpo_dist.packing.images import shortest_with_images
from orpo_dist.packing.lengths import PairLengths, pair_lengths, sharing_gain
from orpo_dist.packing.split import SequencePlace
from orpo_dist.run.prepare import Preparation

LEAST_SHARING_GAIN = 1.05

logger = get_logger(__name__)


def layout_options(
    args: ORPOConfig,
    objective: Objective,
    preparation: Preparation,
    environment: Environment,
    trl_collator: Callable[[list[dict]], dict[str, Any]] | None,
    train_rows: Any,
    eval_rows: Any,
) -> LayoutOptions:
    """train_rows: tokenised rows or None. eval_rows: the same, or a dict of them.

    Raises:
        UserError: the rows have images and there is no processor.
    """
    eval_sets = list(eval_rows.values()) if isinstance(eval_rows, dict) else [eval_rows]
    sets = [rows for rows in (train_rows, *eval_sets) if rows is not None]
    padding = args.padding_value if args.padding_value is not None else preparation.tokenizer.pad_token_id
    return LayoutOptions(
        objective=objective,
        padding_free=args.padding_free,
        prefix_sharing=args.prefix_sharing and not _has_noise(args) and _sharing_pays(train_rows),
        verify_layout=args.verify_layout,
        loss_chunk_size=args.loss_chunk_size,
        nll_scope=args.nll_scope,
        pad_token_id=padding,  # type: ignore[arg-type]
        max_length=preparation.options.max_length or _longest(sets),
        compute_dtype=compute_dtype(args.bf16, args.fp16),
        trl_collator=trl_collator,
        images=_image_setup(sets, preparation, environment),
        sequence=_sequence_place(environment),
    )


def _sequence_place(environment: Environment) -> SequencePlace | None:
    size = environment.sequence_size
    return SequencePlace(size, environment.sequence_place) if size > 1 else None


def _has_noise(args: ORPOConfig) -> bool:
    if args.neftune_noise_alpha is None:
        return False
    if args.padding_free:
        logger.warning("prefix_sharing is off: with neftune_noise_alpha each sequence has a prompt with its own noise.")
    return True


def _longest(sets: list[Any]) -> int | None:
    """Tokens of the longest sequence, P + C or P + R, over all sets."""
    return max((pair.longest_sequence for rows in sets for pair in pair_lengths(rows)), default=None)


def _sharing_pays(train_rows: Any) -> bool:
    lengths: list[PairLengths] = pair_lengths(train_rows) if train_rows is not None else []
    gain = sharing_gain(lengths)
    if lengths and gain < LEAST_SHARING_GAIN:
        logger.warning("prefix_sharing is off: it would save a factor of %.3f in tokens, under 1.05.", gain)
    return not lengths or gain >= LEAST_SHARING_GAIN


def _image_setup(sets: list[Any], preparation: Preparation, environment: Environment) -> ImageSetup | None:
    """How images enter the forward; None if no row has one."""
    example = next((row for rows in sets if (row := shortest_with_images(rows)) is not None), None)
    if example is None:
        return None
    if not isinstance(preparation.processing_class, ProcessorMixin):
        problem = torchvision.problem()
        raise UserError(
            "The rows have images, but the processing class is a tokenizer: pass the model's AutoProcessor."
            + (f" It may need torchvision: {problem}; {torchvision.remedy()}." if problem else "")
        )
    partitioned = environment.sharding.partitions_weights
    return ImageSetup(preparation.processing_class, example, partitioned, environment.world_size)
