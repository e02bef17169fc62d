"""Facts about other libraries for which they have no API: from versions, source text or error messages.

Each is read only here, and tests/model/test_upstream.py fails when a release changes it.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import distributed, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

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


def text_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder of a model, without its output layer.

    `get_decoder` guesses by names and returns the model itself for Llama 4, whose decoder has another name than its
    class says. https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py
    """
    decoder = model.get_decoder()
    if decoder is model and model.get_output_embeddings() is not None:
        return next((part for part in model.children() if isinstance(part, PreTrainedModel)), decoder)
    return decoder


def drops_keywords(module: type[nn.Module], part: str) -> bool:
    """Whether the forward of a layer calls its part `self.<part>` without `**kwargs`, and so keeps from it what the
    layer was given beside its own arguments.

    Reads the source of the forward, which no class describes: transformers' decoder layers differ in it.
    https://github.com/huggingface/transformers/blob/main/src/transformers/models/stablelm/modeling_stablelm.py
    """
    try:
        source = inspect.getsource(inspect.unwrap(module.forward))
    except OSError:  # no source file
        return False
    calls = [
        node
        for node in ast.walk(ast.parse(textwrap.dedent(source)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == part
    ]
    return bool(calls) and not any(keyword.arg is None for call in calls for keyword in call.keywords)


def scales_queries_by_place(module: nn.Module) -> bool:
    """Whether a layer's attention temperature follows the place of a token in its row: Llama 4's layers without rotary
    positions, by class. Ministral 3 and Mistral 4 take the positions that they are given.
    https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama4/modeling_llama4.py"""
    llama4 = sys.modules.get("transformers.models.llama4.modeling_llama4")  # not loaded: no such layer
    if llama4 is None or not isinstance(module, llama4.Llama4TextAttention):
        return False
    return bool(module.attn_temperature_tuning) and not module.use_rope


def has_window_in_masks_alone(model: type[nn.Module], attention: Iterable[type[nn.Module]]) -> bool:
    """Whether a decoder builds sliding windows into its masks and none of its attention layers passes one on to its
    attention function: Phi-3.5-MoE, Qwen2-MoE, Doge.

    Reads the source of the forwards. transformers' other families do both.
    https://github.com/huggingface/transformers/blob/main/src/transformers/models/phimoe/modeling_phimoe.py
    """
    try:
        masks = inspect.getsource(inspect.unwrap(model.forward))
        layers = [inspect.getsource(inspect.unwrap(layer.forward)) for layer in attention]
    except OSError:  # no source file
        return False
    return "create_sliding_window_causal_mask" in masks and not any("sliding_window" in layer for layer in layers)


def refuses_keyword(error: TypeError, keyword: str) -> bool:
    """Whether `error` says that a forward takes no argument of this name.

    Reads CPython's message, "forward() got an unexpected keyword argument 'orpo_layout'". A signature cannot be asked
    instead: the call that fails may be that of any layer within the model.
    """
    return f"unexpected keyword argument '{keyword}'" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the accelerator, torch's CPU allocator or Python itself ran out of memory.

    Accelerators raise torch.OutOfMemoryError; the CPU allocator and cuBLAS raise a plain RuntimeError.
    https://github.com/pytorch/pytorch/blob/main/c10/core/impl/alloc_cpu.cpp
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))


def is_failure_of_peers(error: BaseException) -> bool:
    """Whether a collective failed: a rank that is gone, a timeout.
    https://docs.pytorch.org/docs/stable/distributed.html#debugging-torch-distributed-applications"""
    return isinstance(error, distributed.DistError)


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


def layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config of each layer. Those of one config may differ (Gemma 4's head_dim) from transformers 5.20 on, which
    then refuses the field on the config itself; before, there is no such attribute.
    https://github.com/huggingface/transformers/tree/main/src/transformers/integrations/heterogeneity
    """
    own = getattr(config, "per_layer_config", None)
    return [config if own is None else own[layer] for layer in range(config.num_hidden_layers)]


def computes_mrope_positions(model: type[nn.Module]) -> bool:
    """Whether a model class can compute positions in three axes (Qwen-VL) from token types, without its weights.

    transformers has no common base class or mixin for it: the families share a method, `get_rope_index`, which takes
    `mm_token_type_ids` and `image_grid_thw` in those that need nothing else. MiniCPM-V 4.7 reads its tokens too.
    https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2_vl/modeling_qwen2_vl.py
    """
    method = getattr(model, "get_rope_index", None)
    taken = inspect.signature(method).parameters if method is not None else ()
    return "mm_token_type_ids" in taken and "image_grid_thw" in taken


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
