"""Packages that a run needs, asked for before data is prepared or a model is loaded."""

from importlib.util import find_spec
from typing import Any

from transformers import BitsAndBytesConfig
from transformers.training_args import OptimizerNames
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available

from orpo_dist.errors import UserError

BITSANDBYTES = ("bitsandbytes", "pip install 'orpo-dist[qlora]'")
# Beginnings of the names in transformers' OptimizerNames -> module, how to install it. The longer names come first.
# https://github.com/huggingface/transformers/blob/main/src/transformers/trainer_optimizer.py
OPTIMIZERS = {
    "adamw_torch_4bit": ("torchao", "pip install torchao"),
    "adamw_torch_8bit": ("torchao", "pip install torchao"),
    "adamw_torch_npu": ("torch_npu", "pip install torch_npu"),
    "adamw_torch_xla": ("torch_xla", "pip install torch_xla"),
    "adamw_torch": None,
    "adamw_anyprecision": ("torchdistx", "https://github.com/pytorch/torchdistx"),
    "adamw_": BITSANDBYTES,  # adamw_bnb_8bit, adamw_8bit
    "ademamix": BITSANDBYTES,
    "lion": BITSANDBYTES,
    "paged_": BITSANDBYTES,
    "rmsprop_bnb": BITSANDBYTES,
    "rmsprop": None,
    "adafactor": None,
    "adagrad": None,
    "adalomo": ("lomo_optim", "pip install lomo-optim"),
    "lomo": ("lomo_optim", "pip install lomo-optim"),
    "sgd": None,
    "galore": ("galore_torch", "pip install galore-torch"),
    "apollo": ("apollo_torch", "pip install apollo-torch"),
    "grokadamw": ("grokadamw", "pip install grokadamw"),
    "schedule_free": ("schedulefree", "pip install schedulefree"),
    "stable_adamw": ("optimi", "pip install torch-optimi"),
}


def refuse_missing_packages(
    optim: OptimizerNames | str, attn_implementation: str | None = None, quantization: str | None = None
) -> None:
    """optim: of TrainingArguments. attn_implementation, quantization: as the model is to be loaded; quantization is the
    option that asks for bitsandbytes.

    Raises:
        UserError: a package that one of them needs is not installed.
    """
    name = OptimizerNames(optim).value
    needed: list[tuple[str, tuple[str, str] | None]] = [
        (f"optim={name}", next((need for start, need in OPTIMIZERS.items() if name.startswith(start)), None))
    ]
    if quantization is not None:
        needed.append((quantization, BITSANDBYTES))
    for option, need in needed:
        if need is not None and find_spec(need[0]) is None:
            raise UserError(f"{option} needs {need[0]}, which is not installed: {need[1]}.")
    available = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if attn_implementation in available and not (available[attn_implementation]() or is_kernels_available()):
        raise UserError(
            f"attn_implementation={attn_implementation} needs flash-attn and a GPU that it supports; it is not "
            "available here. Leave it out: the packed layout chooses its own kernel."
        )


def quantization_asked(model_init_kwargs: dict[str, Any]) -> str | None:
    """The keyword argument of from_pretrained that asks for bitsandbytes, None if there is none."""
    config = model_init_kwargs.get("quantization_config")
    if isinstance(config, dict):
        asked = config.get("load_in_4bit") or config.get("load_in_8bit") or config.get("quant_method") == "bitsandbytes"
    else:
        asked = isinstance(config, BitsAndBytesConfig)
    return "quantization_config" if asked else None
