"""Which options of a trainer may change between its construction and `train()`, as a search does for every trial.

The trainer takes over what `args` says when training begins. What data, model or processes were made with stays: a
change of it is refused by name.
"""

import copy
from dataclasses import fields
from typing import Any

from orpo_dist.config import ORPOConfig
from orpo_dist.errors import UserError
from orpo_dist.options.data import DataOptions, ImageOptions

_OF_DATA = {field.name for kind in (DataOptions, ImageOptions) for field in fields(kind)} | {"is_encoder_decoder"}
_OF_MODEL = {
    "disable_dropout",
    "model_init_kwargs",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "train_projector",
    "train_vision_tower",
    "trust_remote_code",
}
_OF_PROCESSES = {
    "accelerator_config",
    "bf16",
    "ddp_backend",
    "deepspeed",
    "fp16",
    "fsdp",
    "fsdp_config",
    "generate_during_eval",
    "parallelism_config",
    "report_to",
    "sequence_parallel_size",
    "use_cpu",
}


class ArgsInForce:
    """The options that a trainer works with.

    Args:
        makes_models: whether every `train()` makes its model (model_init), so that its options may change.

    Attributes:
        taken: the options by name.
    """

    def __init__(self, args: ORPOConfig, *, makes_models: bool):
        self._reasons = {name: "its rows are tokenised" for name in _OF_DATA}
        self._reasons |= {name: "its processes and callbacks are set up" for name in _OF_PROCESSES}
        if not makes_models:
            self._reasons |= {name: "its model is adapted" for name in _OF_MODEL}
        self._fixed = {name: copy.deepcopy(getattr(args, name)) for name in self._reasons}
        self.take(args)

    def take(self, args: ORPOConfig) -> None:
        self.taken: dict[str, Any] = dict(vars(args))

    def changed(self, args: ORPOConfig) -> bool:
        """Whether an option differs from what was taken.

        Raises:
            UserError: one that is fixed, or a value that ORPOConfig refuses.
        """
        if vars(args) == self.taken:
            return False
        for name, value in self._fixed.items():
            if getattr(args, name) != value:
                raise UserError(
                    f"{name} was {value!r} when the trainer was made and is {getattr(args, name)!r} now, but "
                    f"{self._reasons[name]} by then. Make a new ORPOTrainer for it."
                )
        args.check()
        return True
