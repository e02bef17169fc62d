"""The model at the end of a run: whole, whatever form its checkpoints have, and checked before the run has finished.

Trainer.save_model writes no weights where FSDP keeps its checkpoints sharded (accelerate's default) or ZeRO-3 is not
told to gather (DeepSpeed's default), and says so at most in a log line.
https://github.com/huggingface/transformers/issues/30491
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from orpo_dist.distributed.environment import Sharding
from orpo_dist.errors import SaveError
from orpo_dist.model.loading.saved import weight_times, why_unloadable


@contextmanager
def whole_weights(accelerator: Accelerator, sharding: Sharding, engine: Any) -> Iterator[None]:
    """Within it, saving gathers the whole model. Every rank takes part.

    engine: DeepSpeed's, None before training.
    """
    if sharding is Sharding.FSDP:
        from torch.distributed.fsdp import StateDictType

        plugin: Any = accelerator.state.fsdp_plugin
        form, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            yield
        finally:
            plugin.state_dict_type = form
    elif sharding is Sharding.ZERO3 and engine is not None:
        config = engine._config.zero_config
        gathers, config.gather_16bit_weights_on_model_save = config.gather_16bit_weights_on_model_save, True
        try:
            yield
        finally:
            config.gather_16bit_weights_on_model_save = gathers
    else:
        yield


def save_checked(write: Callable[[], None], model: Any, folder: Path, *, checks: bool, trust_remote_code: bool) -> None:
    """Call `write`, which saves `model` in `folder`, and check that it can be loaded from there.

    checks: whether this rank writes files and looks at them.

    Raises:
        SaveError: transformers or peft could not load what lies there.
    """
    before = weight_times(folder) if checks else {}
    write()
    reason = why_unloadable(model, folder, before, trust_remote_code=trust_remote_code) if checks else None
    if reason is not None:
        raise SaveError(
            f"Training is done, but {folder} holds no model that could be loaded: {reason}. The checkpoints of the "
            "run are not touched."
        )
