"""From a name to a model: precision, quantisation, devices."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from orpo_dist.errors import UserError
from orpo_dist.model.hub import hub_errors
from orpo_dist.model.vision import is_vision_language, vision_parts

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
QUANT_STORAGES = {**DTYPES, "uint8": torch.uint8}
_SNAPSHOT = re.compile(r"models--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})")


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """Which model, in what precision, with which adapter; the names are those of TRL's ModelConfig.

    Raises:
        UserError: options that contradict each other.
    """

    model_name_or_path: str | None = _option(None, "Model on the hub, or a folder.")
    model_revision: str = _option("main", "Branch, tag or commit of the model on the hub.")
    dtype: str | None = _option(
        None,
        "Precision of the loaded weights. Unset: float32 when all weights are trained, the precision of the "
        "computation (bf16, fp16, else float32) when only an adapter is.",
        choices=["auto", *DTYPES],
    )
    attn_implementation: str | None = _option(None, "Attention implementation, as in transformers.")
    use_peft: bool = _option(False, "Train a LoRA adapter instead of all weights.")
    adapter_name_or_path: str | None = _option(None, "Continue training this adapter, with its own settings.")
    merge_adapter: bool = _option(False, "Merge the adapter into its base after training.")
    lora_r: int = _option(16, "Rank of LoRA.")
    lora_alpha: int = _option(32, "LoRA alpha: the update is scaled by alpha / r.")
    lora_dropout: float = _option(0.05, "Dropout on the input of the adapter.")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that get an adapter. Unset: all-linear, every linear layer but the output head."},
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Parameters without a linear layer that get an adapter: a mixture's fused experts."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter."}
    )
    use_rslora: bool = _option(False, "Rank-stabilised LoRA: scale by alpha / sqrt(r).")
    use_dora: bool = _option(False, "DoRA: train direction and magnitude apart.")
    load_in_4bit: bool = _option(False, "Quantise the base to 4 bits (QLoRA). Needs an adapter.")
    load_in_8bit: bool = _option(False, "Quantise the base to 8 bits. Needs an adapter.")
    bnb_4bit_quant_type: str = _option("nf4", "4-bit data type.", choices=["nf4", "fp4"])
    use_bnb_nested_quant: bool = _option(True, "Double quantisation: quantise the quantisation constants too.")
    bnb_4bit_quant_storage: str | None = _option(
        None,
        "Type that the 4-bit weights are stored as. Unset: the precision of the computation, which ZeRO-3 and FSDP2 "
        "can shard.",
        choices=list(QUANT_STORAGES),
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("load_in_4bit and load_in_8bit are both set: choose one.")
        if (self.load_in_4bit or self.load_in_8bit) and not self.trains_adapter:
            option = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            raise UserError(
                f"{option} without an adapter: quantised weights are rounded to a few levels and cannot be trained. "
                "Set use_peft=true (QLoRA), or leave quantisation out."
            )

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained, a new one or a given one."""
        return self.use_peft or self.adapter_name_or_path is not None


@dataclass(frozen=True)
class BaseIdentity:
    """Where a model came from: hub id and commit, or an absolute folder and no revision."""

    name: str
    revision: str | None


def compute_dtype(bf16: bool | None, fp16: bool) -> torch.dtype:
    """Precision of the matrix products under the trainer's mixed-precision options."""
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def resolve_dtype(
    arguments: ModelArguments, *, bf16: bool | None = False, fp16: bool = False
) -> torch.dtype | Literal["auto"]:
    """Precision the weights are loaded in.

    Trained weights stay in float32 (mixed precision casts them for the computation only): an update far below a
    bfloat16 step would be lost. A frozen base needs no more than the precision of the computation.

    Raises:
        UserError: float16 weights that are to be trained; gradient scaling does not work on them.
    """
    if arguments.dtype == "auto":
        return "auto"
    if arguments.dtype is None:
        return compute_dtype(bf16, fp16) if arguments.trains_adapter else torch.float32
    dtype = parse_dtype(arguments.dtype)
    if dtype == torch.float16 and not arguments.trains_adapter:
        raise UserError(
            "dtype=float16 without an adapter: float16 weights cannot be trained (their gradients overflow and cannot "
            "be unscaled). Leave dtype unset and use fp16=true for float16 computation, or train an adapter."
        )
    return dtype


def parse_dtype(name: str) -> torch.dtype:
    """`bfloat16`, `float16` or `float32` as a torch dtype. Raises UserError on anything else."""
    if name not in DTYPES:
        raise UserError(f"dtype={name!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def quantization_config(arguments: ModelArguments, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes settings, or None without quantisation.

    The 4-bit weights are stored as `compute_dtype`: ZeRO-3 and FSDP2 shard flat buffers of one floating dtype, and a
    mixed-precision policy casts every other dtype, which would change the stored bits.
    https://huggingface.co/docs/peft/accelerate/fsdp

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if not (arguments.load_in_4bit or arguments.load_in_8bit):
        return None
    if find_spec("bitsandbytes") is None:
        option = "load_in_4bit" if arguments.load_in_4bit else "load_in_8bit"
        raise UserError(f"{option} needs bitsandbytes, which is not installed: pip install 'orpo-dist[qlora]'.")
    if arguments.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    storage = arguments.bnb_4bit_quant_storage
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=arguments.use_bnb_nested_quant,
        bnb_4bit_quant_storage=compute_dtype if storage is None else QUANT_STORAGES[storage],
    )


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, token: str | bool | None = None
) -> PretrainedConfig:
    """The config of a model, read before its weights.

    Raises:
        UserError: not found, gated, offline, an adapter's folder, or code of the repository that was not allowed.
    """
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name} holds an adapter, not a model: give its base as model_name_or_path and this folder as "
            "adapter_name_or_path."
        )
    with hub_errors(name, revision):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code, token=token)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """A causal, an encoder-decoder or a vision-language model, as its config says.

    Of a vision-language model, quantisation takes the language model alone; tower and projector keep `dtype`.

    dtype None means float32, "auto" that of the checkpoint. On a GPU a quantised model goes to this process's device
    at once; every other one stays where transformers puts it, and the trainer moves or shards it. Under ZeRO-3 (once
    TrainingArguments exist) transformers partitions the weights while it loads them.

    Raises:
        UserError: what `load_config` raises, or a quantisation that the distributed set-up cannot shard.
    """
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code, token=token)
    _check_shardable(name, quantization_config, getattr(config, "quantization_config", None))
    if quantization_config is not None:
        if is_vision_language(config):
            quantization_config.llm_int8_skip_modules = _unquantised_modules(config)
        model_init_kwargs["quantization_config"] = quantization_config
        if torch.cuda.is_available() and not is_deepspeed_zero3_enabled():
            # Each rank would otherwise fill GPU 0 when its device has not been selected yet.
            model_init_kwargs.setdefault("device_map", {"": int(os.environ.get("LOCAL_RANK", "0"))})
    with hub_errors(name, revision):
        model = auto_class_of(config).from_pretrained(
            name,
            revision=revision,
            dtype=torch.float32 if dtype is None else dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            token=token,
            **model_init_kwargs,
        )
    # transformers 5.17 notes the commit here; later ones do not, and still leave it out of what they save.
    model.config._commit_hash = _cached_commit(name, revision)
    return model


def auto_class_of(config: PretrainedConfig) -> Any:
    """transformers' auto class for the kind of model a config describes."""
    if is_vision_language(config):
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _unquantised_modules(config: PretrainedConfig) -> list[str]:
    """Names of tower, projector and output head, from a model without weights."""
    with plain_loading(), torch.device("meta"):
        model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        model = model_class(config)
    parts, head = vision_parts(model), model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    return [re.escape(name) for name in (*parts.tower, *parts.projector, *heads)]


@contextmanager
def plain_loading() -> Iterator[None]:
    """Whole models although ZeRO-3 or FSDP is set up, for what one rank does alone."""
    deepspeed_config = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = deepspeed_config
        if fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp


def base_identity(model: PreTrainedModel) -> BaseIdentity:
    """Hub id and commit of a loaded model, read out of the cache path where it was loaded from one.

    The commit of a model from the hub is known where `load_model` loaded it, or a transformers that notes it.
    """
    name = str(model.name_or_path)
    snapshot = _SNAPSHOT.search(name)
    if snapshot:
        return BaseIdentity(snapshot["name"].replace("--", "/"), snapshot["revision"])
    if Path(name).is_dir():
        return BaseIdentity(str(Path(name).resolve()), None)
    return BaseIdentity(name, getattr(model.config, "_commit_hash", None))


def _cached_commit(name: str, revision: str | None) -> str | None:
    if Path(name).exists():
        return None
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    snapshot = _SNAPSHOT.search(file) if isinstance(file, str) else None
    return snapshot["revision"] if snapshot else None


def _check_shardable(name: str, quantization: BitsAndBytesConfig | None, stored: Any) -> None:
    zero3, fsdp = is_deepspeed_zero3_enabled(), os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    if not (zero3 or fsdp):
        return
    strategy = "ZeRO-3" if zero3 else "FSDP"
    stored_config = stored if isinstance(stored, dict) else stored.to_dict() if stored is not None else {}
    if (quantization is not None and quantization.load_in_8bit) or stored_config.get("load_in_8bit"):
        raise UserError(
            f"8-bit weights cannot be sharded by {strategy}: use load_in_4bit=true, or DDP or ZeRO-2 with 8 bits."
        )
    if stored_config.get("load_in_4bit") and stored_config.get("bnb_4bit_quant_storage", "uint8") == "uint8":
        raise UserError(
            f"{name} is stored as 4-bit bytes, which {strategy} cannot shard: give the full-precision model and set "
            "load_in_4bit=true."
        )
