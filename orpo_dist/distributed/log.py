"""The logger of the package: it logs on the first rank only.

    logger = get_logger(__name__)
    logger.warning("Padded layout: %s.", reason)

accelerate's `get_logger` does the same but raises until its state exists, and loading models and data comes earlier.
https://huggingface.co/docs/accelerate/package_reference/logging
"""

import logging

from torch import distributed

from orpo_dist.distributed.environment import launched_rank


class FirstRankLogger(logging.LoggerAdapter):
    """A standard logger that is switched off on every rank but the first."""

    def isEnabledFor(self, level: int) -> bool:
        return _rank() == 0 and super().isEnabledFor(level)


def get_logger(name: str) -> FirstRankLogger:
    return FirstRankLogger(logging.getLogger(name))


def _rank() -> int:
    """The rank in the process group; before it exists, the one set by the launcher (torchrun, accelerate launch)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    launched = launched_rank()
    return launched.rank if launched is not None else 0
