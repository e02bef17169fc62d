"""From a name to a model: precision, quantisation, devices."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from orpo_dist.distributed.environment import Sharding, fsdp_hidden, launched_rank, loading_sharding
from orpo_dist.errors import UserError
from orpo_dist.model.loading.hub import hub_errors
from orpo_dist.model.loading.vision import is_vision_language, vision_parts
from orpo_dist.model.patches import COMMIT_OF_MODEL, WHOLE_MODEL_LOADING, replace_attribute
from orpo_dist.options.model import QUANT_STORAGES, ModelArguments

_SNAPSHOT = re.compile(r"models--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})")


@dataclass(frozen=True)
class BaseIdentity:
    """Where a model came from: hub id and commit, or an absolute folder and no revision."""

    name: str
    revision: str | None


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
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """A causal, an encoder-decoder or a vision-language model, depending on its config.

    Quantisation of a vision-language model applies to the language model only; tower and projector keep `dtype`.

    dtype None means float32, "auto" that of the checkpoint. On a GPU a quantised model goes to this process's device
    at once; every other one stays where transformers puts it, and the trainer moves or shards it. Under ZeRO-3 (once
    TrainingArguments exist) transformers partitions the weights while it loads them.

    Raises:
        UserError: what `load_config` raises, an argument that from_pretrained does not have, or a quantisation that
            the distributed set-up cannot shard.
    """
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code, token=token)
    _check_shardable(name, quantization_config, config.to_dict().get("quantization_config") or {})
    if quantization_config is not None:
        if is_vision_language(config) and isinstance(quantization_config, BitsAndBytesConfig):
            quantization_config.llm_int8_skip_modules = _unquantised_modules(config)
        model_init_kwargs["quantization_config"] = quantization_config
        if torch.cuda.is_available() and loading_sharding() is not Sharding.ZERO3:
            # Each rank would otherwise fill GPU 0 when its device has not been selected yet.
            launched = launched_rank()
            model_init_kwargs.setdefault("device_map", {"": launched.local_rank or 0 if launched is not None else 0})
    try:
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
    except TypeError as error:  # from_pretrained passes on what it does not know
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in model_init_kwargs:
            raise
        raise UserError(f"model_init_kwargs: from_pretrained has no argument {unknown[1]!r}. Drop it.") from error
    # transformers 5.17 notes the commit here; later ones do not, and still leave it out of what they save.
    replace_attribute(model.config, "_commit_hash", _cached_commit(name, revision), COMMIT_OF_MODEL)
    return model


def auto_class_of(config: PretrainedConfig) -> Any:
    """transformers' auto class for the kind of model a config describes."""
    if is_vision_language(config):
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _unquantised_modules(config: PretrainedConfig) -> list[str]:
    """Names of tower, projector and output head, from a model without weights."""
    with loading_whole_models(), torch.device("meta"):
        model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        model = model_class(config)
    parts, head = vision_parts(model), model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    return [re.escape(name) for name in (*parts.tower, *parts.projector, *heads)]


@contextmanager
def loading_whole_models() -> Iterator[None]:
    """Within this block models are loaded unsharded even under ZeRO-3 or FSDP, for work of a single rank."""
    no_deepspeed = replace_attribute(deepspeed_integration, "_hf_deepspeed_config_weak_ref", None, WHOLE_MODEL_LOADING)
    with no_deepspeed, fsdp_hidden():
        yield


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
    return BaseIdentity(name, vars(model.config).get("_commit_hash"))  # private, and absent from a config made by hand


def _cached_commit(name: str, revision: str | None) -> str | None:
    if Path(name).exists():
        return None
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    snapshot = _SNAPSHOT.search(file) if isinstance(file, str) else None
    return snapshot["revision"] if snapshot else None


def _check_shardable(name: str, quantization: Any, stored: dict[str, Any]) -> None:
    """stored: the quantisation that the checkpoint is stored in, empty for a plain one."""
    sharding = loading_sharding()
    if not sharding.partitions_weights:
        return
    strategy = "ZeRO-3" if sharding is Sharding.ZERO3 else "FSDP"
    in_8bit = isinstance(quantization, BitsAndBytesConfig) and quantization.load_in_8bit
    if in_8bit or stored.get("load_in_8bit"):
        raise UserError(
            f"8-bit weights cannot be sharded by {strategy}: use load_in_4bit=true, or DDP or ZeRO-2 with 8 bits."
        )
    if stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_storage", "uint8") == "uint8":
        raise UserError(
            f"{name} is stored as 4-bit bytes, which {strategy} cannot shard: give the full-precision model and set "
            "load_in_4bit=true."
        )
