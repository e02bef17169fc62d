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
from peft.utils.other import ModulesToSaveWrapper

from orpo_dist.distributed.agree import as_on_first_rank
from orpo_dist.distributed.environment import Sharding
from orpo_dist.errors import SaveError
from orpo_dist.model.loading.saved import has_resized_vocabulary, weight_times, why_unloadable


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


@contextmanager
def resized_embeddings(model: Any, sharding: Sharding) -> Iterator[None]:
    """Within it, saving an adapter under ZeRO-3 gathers the embeddings that new tokens have resized. Every rank takes
    part.

    Trainer.save_model asks DeepSpeed for the trained weights alone, by requires_grad, and peft would save these frozen
    ones too, without which the adapter fits no base.
    https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py (exclude_frozen_parameters)
    """
    frozen = []
    if sharding is Sharding.ZERO3 and as_on_first_rank(has_resized_vocabulary(model)):
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]
        # Of modules_to_save the trained copy is gathered anyway, and is what peft loads.
        layers = [layer for layer in layers if layer is not None and not isinstance(layer, ModulesToSaveWrapper)]
        weights = [weight for layer in layers for weight in layer.parameters()]
        frozen = [weight for weight in weights if not weight.requires_grad and weight.is_floating_point()]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


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
