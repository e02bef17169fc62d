"""Out-of-memory errors that name the longest pairs and the options that bound them."""

from collections.abc import Sequence

from orpo_dist.config import ORPOConfig
from orpo_dist.errors import RankError
from orpo_dist.packing.lengths import PairLengths

SHOWN = 3


def out_of_memory(
    error: BaseException, step: int, micro_batch: Sequence[int], lengths: Sequence[PairLengths], args: ORPOConfig
) -> RankError:
    """The error for the user. micro_batch: indices of its pairs."""
    longest = sorted(micro_batch, key=lambda index: -lengths[index].shared_tokens)[:SHOWN]
    pairs = "; ".join(
        f"pair {index}: {lengths[index].prompt} + {lengths[index].chosen} + {lengths[index].rejected} tokens"
        for index in longest
    )
    bounds = [f"max_length (now {args.max_length}) bounds prompt + completion"]
    if args.per_device_train_batch_size > 1:
        bounds.append(
            f"per_device_train_batch_size (now {args.per_device_train_batch_size}) bounds the pairs of a micro-batch: "
            "halve it and double gradient_accumulation_steps for the same run"
        )
    if not args.gradient_checkpointing:
        bounds.append("gradient_checkpointing=true recomputes activations instead of keeping them")
    first_line = str(error).strip().split("\n", maxsplit=1)[0]
    return RankError(
        f"Out of memory in step {step}. The longest of {len(micro_batch)} pairs in the micro-batch (prompt + chosen + "
        f"rejected): {pairs}. {'; '.join(bounds)}. ({first_line})"
    )
