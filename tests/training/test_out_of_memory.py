"""Out of memory, said in terms of the data."""

from types import SimpleNamespace

from orpo_dist.packing.lengths import PairLengths
from orpo_dist.training.out_of_memory import out_of_memory

LENGTHS = [
    PairLengths(1, 1, 1),
    PairLengths(50, 20, 30),
    PairLengths(9, 9, 9),
    PairLengths(5, 5, 5),
    PairLengths(70, 1, 1),
]


def args(**changed):
    return SimpleNamespace(
        **{"max_length": 128, "per_device_train_batch_size": 4, "gradient_checkpointing": False, **changed}
    )


def told(**changed):
    error = RuntimeError("CUDA out of memory. Tried\nmore lines")
    return str(out_of_memory(error, 3, [0, 1, 2, 4], LENGTHS, args(**changed)))


def test_the_longest_pairs_of_the_micro_batch():
    text = told()
    assert "Out of memory in step 3. The longest of 4 pairs" in text
    assert "pair 1: 50 + 20 + 30 tokens; pair 4: 70 + 1 + 1 tokens; pair 2: 9 + 9 + 9 tokens" in text
    assert "pair 3" not in text and "pair 0" not in text  # not in the micro-batch; the fourth of three
    assert text.endswith("(CUDA out of memory. Tried)")


def test_only_options_that_can_help_are_named():
    assert "max_length (now 128)" in told() and "per_device_train_batch_size (now 4)" in told()
    assert "gradient_checkpointing=true" in told()
    small = told(per_device_train_batch_size=1, gradient_checkpointing=True)
    assert "per_device_train_batch_size" not in small and "gradient_checkpointing" not in small
