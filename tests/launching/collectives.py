"""Counts the collectives that Python code asks for, by the phase of training that asks."""

import torch.distributed as dist

from orpo_dist import ORPOTrainer

NAMES = (
    "all_reduce", "reduce", "broadcast", "barrier", "all_gather", "all_gather_into_tensor", "gather", "all_to_all",
    "reduce_scatter_tensor", "all_gather_object", "gather_object", "broadcast_object_list",
)  # fmt: skip
PHASES = ("get_batch_samples", "training_step", "log")


def count() -> dict[str, int]:
    """From here on. What DDP's reducer does in the backward is not Python's and not counted."""
    counts: dict[str, int] = {}
    phases = ["elsewhere"]

    def counted(name: str) -> None:
        collective = getattr(dist, name)

        def wrapper(*args, **kwargs):
            key = f"{phases[-1]} {name}"
            counts[key] = counts.get(key, 0) + 1
            return collective(*args, **kwargs)

        setattr(dist, name, wrapper)

    def marked(name: str) -> None:
        method = getattr(ORPOTrainer, name)

        def wrapper(*args, **kwargs):
            phases.append(name)
            try:
                return method(*args, **kwargs)
            finally:
                phases.pop()

        setattr(ORPOTrainer, name, wrapper)

    for name in NAMES:
        counted(name)
    for name in PHASES:
        marked(name)
    return counts
