"""LoRA on a plain, 4-bit or 8-bit base: a new adapter or one to continue from, and the dropout of the base."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.distributed.log import get_logger
from orpo_dist.errors import UserError
from orpo_dist.model.loading.hub import hub_errors
from orpo_dist.model.loading.load import base_identity
from orpo_dist.model.patches import (
    BASE_DROPOUT,
    BASE_OF_ADAPTER,
    PEFT_WARNING,
    UNPACKED_4BIT,
    Patched,
    replace_attribute,
)
from orpo_dist.model.upstream import is_adapter_on_experts_refusal, is_out_of_memory
from orpo_dist.options.model import ModelArguments

logger = get_logger(__name__)

# Names that peft redirects from linear layers to the fused experts of a mixture, and to its router.
# https://github.com/huggingface/peft (utils/transformers_weight_conversion.py, _MOE_TARGET_MODULE_MAPPING)
_REDIRECTED_TO_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def lora_config(arguments: ModelArguments, *, is_encoder_decoder: bool = False) -> LoraConfig | None:
    """The settings of a new adapter; None without an adapter or when a given one is continued.

    Raises:
        UserError: settings that peft cannot combine, or that a given adapter would silently override.
    """
    if arguments.adapter_name_or_path is not None:
        _refuse_settings_of_a_given_adapter(arguments)
        return None
    if not arguments.use_peft:
        return None
    parameters = arguments.lora_target_parameters
    if parameters and arguments.lora_dropout:
        raise UserError(
            f"lora_dropout={arguments.lora_dropout} with lora_target_parameters: an adapter on a bare parameter sees "
            "no input that could be dropped. Set lora_dropout=0."
        )
    if parameters and arguments.use_dora:
        raise UserError("use_dora with lora_target_parameters: DoRA needs linear layers. Leave one of them out.")
    modules: list[str] | str = arguments.lora_target_modules or "all-linear"
    if isinstance(modules, list) and len(modules) == 1:
        modules = modules[0]  # one string is a regular expression or `all-linear`, as in TRL
    return LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if is_encoder_decoder else TaskType.CAUSAL_LM,
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=modules,
        target_parameters=parameters,
        modules_to_save=arguments.lora_modules_to_save,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        bias="none",
    )


def add_adapter(
    model: PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None = None,
    *,
    adapter_name_or_path: str | None = None,
    gradient_checkpointing: bool = False,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    zero3: bool = False,
) -> PreTrainedModel | PeftModel:
    """Make `model` train an adapter: a new one, one from a folder or the hub, or the one it already has.

    A plain model is returned unchanged when no adapter is asked for. The base keeps the precision it was loaded in:
    peft's `prepare_model_for_kbit_training` is not used, since it copies every weight that is not quantised
    (embeddings, head, norms) to float32, which costs memory and which ZeRO-3 and FSDP2 cannot shard beside 4-bit
    weights stored in 16 bits. Adapter weights are float32, except under ZeRO-3, whose gather needs one dtype; its
    optimizer holds the float32 copy there. https://github.com/huggingface/trl/issues/6089

    Args:
        gradient_checkpointing_kwargs: as given to the trainer; `use_reentrant=True` needs an input that requires
            gradients, or the adapters get none.

    Raises:
        UserError: a quantised model without an adapter, two adapters at once, a frozen adapter, one that does not fit
            the base, targets that do not exist, a target whose weight is tied to another.
    """
    if isinstance(model, PeftModel):
        _check_given_adapter(model, peft_config, adapter_name_or_path)
        adapted = model
    elif adapter_name_or_path is not None:
        if peft_config is not None:
            raise UserError(
                f"Both peft_config and the adapter {adapter_name_or_path} are given, and an adapter brings its own "
                "settings. Leave peft_config out to continue it, or the adapter to start a new one."
            )
        adapted = _continue_from(model, adapter_name_or_path)
    elif peft_config is not None:
        adapted = _new_adapter(model, peft_config)
    else:
        _refuse_quantized(model)
        return model
    if is_quantized(adapted):
        _keep_weights_unpacked(adapted)
    if zero3:
        # peft's autocast_adapter_dtype=False does not help: it keeps adapters of quantised layers in float32.
        # https://github.com/huggingface/peft/issues/2889
        dtype = cast(PreTrainedModel, adapted.get_base_model()).dtype
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    if gradient_checkpointing and (gradient_checkpointing_kwargs or {}).get("use_reentrant", False):
        adapted.enable_input_require_grads()
    record_base(adapted)
    return adapted


def record_base(model: PeftModel) -> None:
    """Write the hub id and commit of the base, or its folder, into the settings that are saved with the adapter."""
    base = base_identity(cast(PreTrainedModel, model.get_base_model()))
    for config in model.peft_config.values():
        replace_attribute(config, "base_model_name_or_path", base.name, BASE_OF_ADAPTER)
        replace_attribute(config, "revision", base.revision, BASE_OF_ADAPTER)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning of PEFT_WARNING."""
    caught = warnings.catch_warnings()
    caught.__enter__()
    with Patched(PEFT_WARNING, lambda: caught.__exit__(None, None, None)):
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def disable_base_dropout(model: nn.Module) -> list[Patched]:
    """Switch off the dropout of the base model: modules, and probabilities that layers or configs hold as numbers.

    The dropout of an adapter is left as configured. TRL zeroes that too, and leaves attention dropout, which is a
    number and not a module, switched on.
    """
    handles = []
    for module in _base_modules(model):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            handles.append(replace_attribute(module, "p", 0.0, BASE_DROPOUT))
        handles += _zero_dropout_numbers(module)
        if isinstance(module, PreTrainedModel):
            handles += _zero_dropout_numbers(module.config)  # Falcon reads its config in every forward
    return handles


def _zero_dropout_numbers(holder: Any) -> list[Patched]:
    names = [name for name, value in vars(holder).items() if isinstance(value, float) and "drop" in name]
    return [replace_attribute(holder, name, 0.0, BASE_DROPOUT) for name in names]


def _base_modules(module: nn.Module) -> Iterator[nn.Module]:
    is_adapter_layer = isinstance(module, BaseTunerLayer)
    if not is_adapter_layer:
        yield module
    for name, child in module.named_children():
        if not is_adapter_layer or name == "base_layer":
            yield from _base_modules(child)


def is_quantized(model: PreTrainedModel | PeftModel) -> bool:
    """Whether transformers loaded the base in 4 or 8 bits."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return bool(vars(base).get("is_quantized", False))  # set while loading, on quantised models only


def _refuse_quantized(model: PreTrainedModel) -> None:
    if is_quantized(model):
        raise UserError(
            "The model is quantised and has no adapter: quantised weights are rounded to a few levels and cannot be "
            "trained. Pass peft_config (QLoRA), or load the model without quantisation."
        )


def _keep_weights_unpacked(model: PeftModel) -> None:
    """Keep an evaluation from breaking the training that follows it.

    On a CPU with AVX512-BF16 the first evaluation of bitsandbytes' 4-bit layer packs its weights for a kernel that has
    no backward, and training then continues through that kernel: gradients stop at every frozen layer, with a warning
    at most. (bitsandbytes 0.50, nn/modules.py, Linear4bit.forward)
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            replace_attribute(module, "support_avx512bf16_for_cpu", False, UNPACKED_4BIT)


def _new_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    config = copy.deepcopy(peft_config)  # peft rewrites the targets in place
    _refuse_tied_targets(model, config)
    linear = _linear_names(model)
    if isinstance(config, LoraConfig) and config.target_modules == "all-linear" and _has_fused_experts(model):
        covered = sorted(linear - _REDIRECTED_TO_EXPERTS)
        config.target_modules = covered
        if not config.target_parameters:
            logger.warning(
                "%s is a mixture of experts: the adapter covers %s and no expert. Name experts in "
                "lora_target_parameters to train them too.",
                type(model).__name__,
                ", ".join(covered),
            )
    try:
        with quiet_peft():
            return get_peft_model(model, config)
    except ValueError as error:
        if is_adapter_on_experts_refusal(error):
            raise UserError(
                "The adapter covers the fused experts of a mixture (peft redirects names like gate_proj and down_proj "
                "to them), which take neither dropout nor DoRA: set lora_dropout=0 and use_dora=false, or target the "
                "attention layers alone."
            ) from error
        raise UserError(
            f"The adapter does not fit {type(model).__name__}: {error} Its linear layers are "
            f"{', '.join(sorted(linear))}."
        ) from error


def _linear_names(model: PreTrainedModel) -> set[str]:
    head = model.get_output_embeddings()
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def _has_fused_experts(model: PreTrainedModel) -> bool:
    """Whether experts are stacked in one parameter (experts, out, in), as transformers 5 holds most mixtures."""
    return any(parameter.ndim == 3 and ".experts." in name for name, parameter in model.named_parameters())


def _continue_from(model: PreTrainedModel, adapter: str) -> PeftModel:
    with hub_errors(adapter):
        config = PeftConfig.from_pretrained(adapter)
    base = base_identity(model)
    if config.base_model_name_or_path not in (None, base.name, model.name_or_path):
        logger.warning(
            "The adapter %s was trained on %s and is continued on %s.",
            adapter,
            config.base_model_name_or_path,
            base.name,
        )
    try:
        with hub_errors(adapter), quiet_peft():
            return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    except RuntimeError as error:  # load_state_dict: sizes differ
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"The adapter {adapter} does not fit {base.name}: it was trained on {config.base_model_name_or_path}. "
            "Give that model as model_name_or_path."
        ) from error


def _check_given_adapter(model: PeftModel, peft_config: PeftConfig | None, adapter_name_or_path: str | None) -> None:
    if peft_config is not None or adapter_name_or_path is not None:
        option = "peft_config" if peft_config is not None else "adapter_name_or_path"
        raise UserError(
            f"The model is a PeftModel already, so {option} would add a second adapter. Leave {option} out to continue "
            "its adapter, or pass `model.merge_and_unload()` to start a new one on top."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "The adapter of the given PeftModel is frozen: load it with "
            "PeftModel.from_pretrained(base, path, is_trainable=True)."
        )


def _refuse_settings_of_a_given_adapter(arguments: ModelArguments) -> None:
    for option in fields(ModelArguments):
        if option.name.startswith("lora_") or option.name in ("use_rslora", "use_dora"):
            value = getattr(arguments, option.name)
            if value != option.default:
                raise UserError(
                    f"{option.name}={value} together with adapter_name_or_path={arguments.adapter_name_or_path}: a "
                    f"given adapter brings its own settings. Leave {option.name} out."
                )


def _refuse_tied_targets(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """When tied, the output head and the input embedding are one weight: an adapter on one could not be merged."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    settings = vars(peft_config)  # not every kind of adapter has targets, and LoRA alone can tie its weights
    targets = settings.get("target_modules")
    if head is None or head.weight is not embedding.weight or not isinstance(targets, (list, set)):
        return
    if settings.get("ensure_weight_tying"):
        return
    for name, module in model.named_modules():
        if (module is head or module is embedding) and any(name == t or name.endswith(f".{t}") for t in targets):
            raise UserError(
                f"The adapter targets {name}, and this model's output head and input embeddings are one weight: it "
                "could not be merged without changing both. Leave it out, or pass a LoraConfig with "
                "ensure_weight_tying=True."
            )
