"""ORPO for text and vision-language models, on one process and on many.

from orpo_dist import ORPOConfig, ORPOTrainer
"""

import logging
from typing import TYPE_CHECKING

from orpo_dist.version import __version__

__all__ = ["ORPOConfig", "ORPOTrainer", "__version__"]

if TYPE_CHECKING:
    from orpo_dist.config import ORPOConfig
    from orpo_dist.trainer import ORPOTrainer

# Without the optional `kernels` package bitsandbytes warns at every start on a CPU, used or not: peft imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str):
    # Imported on first use: `orpo-dist --help` and `orpo-dist data check` should not pay for torch.
    if name == "ORPOConfig":
        from orpo_dist.config import ORPOConfig

        return ORPOConfig
    if name == "ORPOTrainer":
        from orpo_dist.trainer import ORPOTrainer

        return ORPOTrainer
    raise AttributeError(f"module 'orpo_dist' has no attribute {name!r}")
