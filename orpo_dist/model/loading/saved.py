"""Whether plain transformers or peft could load what a run has saved, found out without loading it.

The names and shapes in the headers of the weight files are compared with those of the model in memory, in the form in
which it is saved: transformers reverts its weight conversions, peft takes the adapter's name out. No value is read, and
none is gathered: sharded weights know the shape of the whole.

Shape legend: r rank of an adapter.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from orpo_dist.model.loading.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_folder
from orpo_dist.model.loading.adapters import quiet_peft

Shapes = dict[str, tuple[int, ...]]
Times = dict[Path, int]


def weight_times(folder: Path) -> Times:
    """When the weight files in `folder` and one level below were written, in ns: ask before saving."""
    patterns = ("model*.safetensors", ADAPTER_WEIGHTS, f"*/{ADAPTER_WEIGHTS}")
    return {file: file.stat().st_mtime_ns for pattern in patterns for file in folder.glob(pattern)}


def why_unloadable(
    model: PreTrainedModel | PeftModel, folder: Path, before: Times, *, trust_remote_code: bool = False
) -> str | None:
    """What keeps transformers (a model) or peft (its adapters) from loading `folder` as `model`; None if nothing does.

    Args:
        model: the one that was saved, as it was trained: sharded by ZeRO-3 or FSDP2, or whole.
        before: `weight_times` before saving: a file that has not changed since holds the weights of another run.
    """
    try:
        if isinstance(model, PeftModel):
            for name, config in model.peft_config.items():
                _check_adapter(model, name, config, adapter_folder(folder, name), before)
        else:
            _check_model(model, folder, before, trust_remote_code)
    except _Unloadable as error:
        return str(error)
    return None


class _Unloadable(Exception):
    """Its text is the reason."""


def _check_model(model: PreTrainedModel, folder: Path, before: Times, trust_remote_code: bool) -> None:
    if (folder / ADAPTER_CONFIG).is_file():
        raise _Unloadable(
            f"{ADAPTER_CONFIG} of another run lies beside the model, and transformers would load that adapter on top "
            "of it: remove it, or choose an empty output_dir"
        )
    try:
        AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _Unloadable(f"its config cannot be read ({error})") from error
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():  # which transformers prefers
        saved = _shapes_in(single, before)
    elif index.is_file():
        saved = {}
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            saved |= _shapes_in(folder / name, before)
    else:
        raise _Unloadable(f"there is neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    _compare(_saved_form(model), saved, single if single.is_file() else index)


def _check_adapter(model: PeftModel, name: str, config: PeftConfig, folder: Path, before: Times) -> None:
    try:
        saved_config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise _Unloadable(f"the adapter {name} has no {ADAPTER_CONFIG} that can be read ({error})") from error
    saved = _shapes_in(folder / ADAPTER_WEIGHTS, before)
    if config.is_prompt_learning:
        if not saved:
            raise _Unloadable(f"{folder / ADAPTER_WEIGHTS} is empty")
        return
    size, size_of_base = model.config.get_text_config().vocab_size, _vocabulary_of_base(config)
    if size_of_base not in (None, size) and not any(
        "lora" not in key and shape[0] == size for key, shape in saved.items()
    ):
        raise _Unloadable(
            f"{folder / ADAPTER_WEIGHTS} lacks the embeddings, although the vocabulary was resized from {size_of_base} "
            f"to {size} tokens: name them in lora_modules_to_save, or save the resized model as the base"
        )
    with quiet_peft():
        expected = get_peft_model_state_dict(
            model, state_dict=_whole_on_meta(model), adapter_name=name, save_embedding_layers=False
        )
    # A converted adapter has more ranks than the trained one (model/loading/initial.py).
    wider = vars(saved_config).get("r", 1) / vars(config).get("r", 1)
    shapes = {key: _widened(key, tuple(tensor.shape), wider) for key, tensor in expected.items()}
    _compare(shapes, saved, folder / ADAPTER_WEIGHTS)


def has_resized_vocabulary(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the base of an adapter has another vocabulary than others would load, so that peft saves its embeddings
    with the adapter."""
    if not isinstance(model, PeftModel):
        return False
    size = model.config.get_text_config().vocab_size
    return any(_vocabulary_of_base(config) not in (None, size) for config in model.peft_config.values())


def _vocabulary_of_base(config: PeftConfig) -> int | None:
    """Of the base as others load it; None where it is not at hand."""
    try:
        base = AutoConfig.from_pretrained(str(config.base_model_name_or_path), revision=config.revision)
    except (OSError, ValueError, KeyError):
        return None
    return base.get_text_config().vocab_size


def _widened(key: str, shape: tuple[int, ...], factor: float) -> tuple[int, ...]:
    """lora_A is (r, in), lora_B (out, r); of an embedding too."""
    if "lora_A" in key or "lora_embedding_A" in key:
        return (int(shape[0] * factor), *shape[1:])
    if "lora_B" in key or "lora_embedding_B" in key:
        return (shape[0], int(shape[1] * factor), *shape[2:])
    return shape


def _saved_form(model: PreTrainedModel) -> Shapes:
    """Names and shapes as save_pretrained writes them: without what is tied to another tensor or never saved."""
    left_out = {*(model._keys_to_ignore_on_save or ()), *model.all_tied_weights_keys}
    whole = {name: tensor for name, tensor in _whole_on_meta(model).items() if name not in left_out}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, whole).items()}


def _whole_on_meta(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without values, each tensor with the shape that it has when gathered.

    Empty under FSDP1, which flattens the weights and whose state dict is a collective: files and configs are still
    checked."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return {}
    return {
        name: torch.empty(_whole_shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }


def _whole_shape(tensor: torch.Tensor) -> torch.Size:
    zero_shape: Any = vars(tensor).get("ds_shape")  # of a parameter that ZeRO-3 has partitioned; a DTensor's is global
    return cast(torch.Size, tensor.shape if zero_shape is None else zero_shape)


def _shapes_in(file: Path, before: Times) -> Shapes:
    if not file.is_file():
        raise _Unloadable(f"{file} is missing")
    if before.get(file) == file.stat().st_mtime_ns:
        raise _Unloadable(f"{file} is of another run: nothing was written over it")
    try:
        with safe_open(file, framework="pt") as content:
            return {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _Unloadable(f"{file} cannot be read ({error})") from error


def _compare(expected: Shapes, saved: Shapes, file: Path) -> None:
    missing = [name for name in expected if name not in saved]
    if missing:
        raise _Unloadable(f"{file} lacks {_some(missing)}")
    wrong = [f"{name} {saved[name]} instead of {shape}" for name, shape in expected.items() if saved[name] != shape]
    if wrong:
        raise _Unloadable(f"{file} has other shapes: {_some(wrong)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
