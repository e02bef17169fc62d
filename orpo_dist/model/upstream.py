"""Facts about other libraries for which they have no API: from versions, source text or error messages.

Each is read only here, and tests/model/test_upstream.py fails when a release changes it.
"""

import inspect
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedConfig, ProcessorMixin

CHECKPOINTS_FORWARD = Version(transformers.__version__).release >= (5, 19)
"""Whether transformers checkpoints a layer's forward, which it wraps when the class is made, or its __call__, as up to
5.18. https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_layers.py"""


def uses_attention_interface(module: type[nn.Module]) -> bool:
    """Whether the forward of a layer looks its attention function up in transformers' AttentionInterface.

    Reads the source of the forward: all models of transformers name ALL_ATTENTION_FUNCTIONS in it, and neither the
    class nor the config says so. `PreTrainedModel._can_set_attn_implementation` reads the module's source in the same
    way, but answers for a whole model, of which other layers may be Mamba or linear attention.
    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py
    """
    try:
        source = inspect.getsource(inspect.unwrap(module.forward))
    except OSError:  # no source file
        return False
    return "ALL_ATTENTION_FUNCTIONS" in source


def computes_aux_loss(model: type[nn.Module]) -> bool:
    """Whether a model's forward returns the load-balancing loss of its routers. Llama 4's config declares a weight for
    it, and no forward of Llama 4 computes it.
    https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama4/modeling_llama4.py
    """
    return "aux_loss" in inspect.getsource(inspect.getmodule(model))  # type: ignore[arg-type]


def refuses_keyword(error: TypeError, keyword: str) -> bool:
    """Whether `error` says that a forward takes no argument of this name.

    Reads CPython's message, "forward() got an unexpected keyword argument 'orpo_layout'". A signature cannot be asked
    instead: the call that fails may be that of any layer within the model.
    """
    return f"unexpected keyword argument '{keyword}'" in str(error)


def wants_remote_code(error: BaseException) -> bool:
    """Whether transformers refused to run Python code of a repository. It raises a plain ValueError that names the
    argument. https://github.com/huggingface/transformers/blob/main/src/transformers/dynamic_module_utils.py"""
    return "trust_remote_code" in str(error)


def is_unknown_architecture(error: BaseException) -> bool:
    """Whether transformers has no such `model_type`. It raises a plain ValueError.
    https://github.com/huggingface/transformers/blob/main/src/transformers/models/auto/configuration_auto.py"""
    return "does not recognize this architecture" in str(error)


def is_adapter_on_experts_refusal(error: ValueError) -> bool:
    """Whether peft refused dropout, DoRA or lora_bias on the fused experts of a mixture.

    peft raises plain ValueErrors that name `lora.ParamWrapper`, its layer for bare parameters.
    https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py
    """
    return "ParamWrapper" in str(error)


def config_value(config: PreTrainedConfig, name: str) -> Any:
    """A field that not every config has; None where it is missing.

    Asked by attribute, since `to_dict()` leaves out what older families translate to the common name, by
    `attribute_map` (Zamba's attention_head_dim is its head_dim) or by a property (Jamba's layer_types).
    https://github.com/huggingface/transformers/blob/main/src/transformers/configuration_utils.py
    """
    return getattr(config, name, None)


def computes_mrope_positions(model: type[nn.Module]) -> bool:
    """Whether a model class can compute positions in three axes (Qwen-VL) from token types, without its weights.

    transformers has no common base class or mixin for it: the families share a method, `get_rope_index`, which takes
    `mm_token_type_ids` in those that need nothing else.
    https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2_vl/modeling_qwen2_vl.py
    """
    method = getattr(model, "get_rope_index", None)
    return method is not None and "mm_token_type_ids" in inspect.signature(method).parameters


def has_image_features(model: type[nn.Module]) -> bool:
    """Whether a model class turns pixels into features in a method of its own, `get_image_features`; no base class or
    mixin says so. https://huggingface.co/docs/transformers/model_doc/llava"""
    return hasattr(model, "get_image_features")


def fixed_image_options(processor: ProcessorMixin) -> dict[str, Any]:
    """What a processor class fixes for its image processor (Gemma 3: do_pan_and_scan), which would win over the image
    processor's own options. transformers 5.17 keeps it elsewhere: no such attribute, nothing to change.
    https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma3/processing_gemma3.py
    """
    return dict(getattr(processor, "images_kwargs", None) or {})
