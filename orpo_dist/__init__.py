"""ORPO for text and vision-language models, in one process or many.

    from orpo_dist import ORPOConfig, ORPOTrainer

`__all__` is the public interface. Its names are imported on first use (PEP 562), so that `orpo-dist --help` and
`orpo-dist data check` do not wait for torch.
"""

import importlib
import logging
from typing import TYPE_CHECKING

from orpo_dist.images.torchvision import watch_for_transformers
from orpo_dist.version import __version__

if TYPE_CHECKING:
    from orpo_dist.config import ORPOConfig
    from orpo_dist.data.prepare import prepare_pairs
    from orpo_dist.errors import NonFiniteRun, RankError, RunStopped, SaveError, TrainingFailed, UserError
    from orpo_dist.loss import Objective, PairScores, log1mexp, log_odds, orpo_loss, pair_sums, preference
    from orpo_dist.merge import merge_run
    from orpo_dist.trainer import ORPOTrainer

__all__ = [
    "NonFiniteRun",
    "ORPOConfig",
    "ORPOTrainer",
    "Objective",
    "PairScores",
    "RankError",
    "RunStopped",
    "SaveError",
    "TrainingFailed",
    "UserError",
    "__version__",
    "log1mexp",
    "log_odds",
    "merge_run",
    "orpo_loss",
    "pair_sums",
    "preference",
    "prepare_pairs",
]

_MODULES = {
    "orpo_dist.config": ("ORPOConfig",),
    "orpo_dist.data.prepare": ("prepare_pairs",),
    "orpo_dist.errors": ("NonFiniteRun", "RankError", "RunStopped", "SaveError", "TrainingFailed", "UserError"),
    "orpo_dist.loss": ("Objective", "PairScores", "log1mexp", "log_odds", "orpo_loss", "pair_sums", "preference"),
    "orpo_dist.merge": ("merge_run",),
    "orpo_dist.trainer": ("ORPOTrainer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

# peft imports bitsandbytes, which warns on every start on a CPU without the optional `kernels` package, used or not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

watch_for_transformers()


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'orpo_dist' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
