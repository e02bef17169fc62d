"""`model_init_kwargs`: further arguments of from_pretrained, in the spellings that people write."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

from orpo_dist.config import ORPOConfig
from orpo_dist.errors import UserError

# Arguments of older versions of transformers, which from_pretrained no longer knows, and what to write.
_OLD = {
    "load_in_4bit": 'quantization_config: {"load_in_4bit": true}',
    "load_in_8bit": 'quantization_config: {"load_in_8bit": true}',
    "bnb_4bit_compute_dtype": "bnb_4bit_compute_dtype inside quantization_config",
    "bnb_4bit_quant_storage": "bnb_4bit_quant_storage inside quantization_config",
    "bnb_4bit_quant_type": "bnb_4bit_quant_type inside quantization_config",
    "bnb_4bit_use_double_quant": "bnb_4bit_use_double_quant inside quantization_config",
    "use_auth_token": "token",
    "use_flash_attention_2": 'attn_implementation: "flash_attention_2"',
}


def model_init_kwargs(args: ORPOConfig) -> dict[str, Any]:
    """The keyword arguments for from_pretrained: `torch_dtype` as `dtype`, a dtype by its name as a torch.dtype, a
    mapping as a quantisation config.

    Raises:
        UserError: not a mapping, an old or a contradicting argument, an unknown dtype or quantisation option.
    """
    given = args.model_init_kwargs
    if given is not None and not isinstance(given, dict):
        raise UserError(f"model_init_kwargs={given!r} is not a mapping, nor a JSON object.")
    kwargs = dict(given or {})
    for name, instead in _OLD.items():
        if name in kwargs:
            raise UserError(f"model_init_kwargs: {name} is an old argument of from_pretrained: write {instead}.")
    kwargs = with_one_dtype(kwargs, "model_init_kwargs")
    if "dtype" in kwargs:
        kwargs["dtype"] = _dtype(kwargs["dtype"])
    if isinstance(kwargs.get("quantization_config"), Mapping):
        kwargs["quantization_config"] = _quantization(dict(kwargs["quantization_config"]))
    return kwargs


def with_one_dtype(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The same with `dtype` for `torch_dtype`, its earlier name. Raises UserError where both are given and differ."""
    if "torch_dtype" not in values:
        return values
    old = values["torch_dtype"]
    if "dtype" in values and values["dtype"] != old:
        raise UserError(f"{where}: dtype={values['dtype']} and torch_dtype={old} are the same option: keep one.")
    return {**{name: value for name, value in values.items() if name != "torch_dtype"}, "dtype": old}


def _dtype(asked: Any) -> Any:
    if not isinstance(asked, str) or asked == "auto":
        return asked
    dtype = vars(torch).get(asked.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"model_init_kwargs: dtype={asked!r} is not a dtype of torch, such as bfloat16, nor auto.")
    return dtype


def _quantization(options: dict[str, Any]) -> Any:
    where = "model_init_kwargs.quantization_config"
    bits = options.get("load_in_4bit") or options.get("load_in_8bit")
    method = options.get("quant_method")
    if bits:
        kind: Any = BitsAndBytesConfig
    elif method in AUTO_QUANTIZATION_CONFIG_MAPPING:
        kind = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
    else:
        raise UserError(
            f"{where}: set load_in_4bit or load_in_8bit, or quant_method to one of "
            f"{', '.join(AUTO_QUANTIZATION_CONFIG_MAPPING)}."
        )
    known = inspect.signature(kind).parameters
    for name in options:  # transformers drops an unknown one
        if name not in known and name not in ("quant_method", "_load_in_4bit", "_load_in_8bit"):
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"{where}: {kind.__name__} has no option {name!r}."
                + (f" Did you mean {close[0]!r}?" if close else f" It has {', '.join(known)}.")
            )
    try:
        return AutoQuantizationConfig.from_dict(options)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
