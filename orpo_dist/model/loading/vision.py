"""Vision-language models: their parts, which parts train, and the rules for their collator.

    language model    text decoder, embeddings, output head          trained
    projector         maps image features to its width               frozen unless train_projector
    vision tower      the rest                                       frozen unless train_vision_tower

Shape legend: B pairs.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from orpo_dist.errors import UserError
from orpo_dist.model.patches import (
    PRESENT_LAYERS,
    SHARED_FEATURES,
    TOKEN_TYPES_OF_TEXT,
    WIDENED_PIXELS,
    Patched,
    add_forward_pre_hook,
    replace_attribute,
)
from orpo_dist.model.upstream import computes_mrope_positions, config_value, has_image_features
from orpo_dist.packing.images import (
    CAUSAL,
    IMAGES_BIDIRECTIONAL,
    PROMPT_BIDIRECTIONAL,
    ImageRules,
    MropePositions,
)

_IN_A_TOWER = ("merger", "projector", "modality_projection")  # projectors that lie within the tower's module (Qwen-VL)
_PER_PATCH = 3 * 14 * 14  # numbers of a patch where the config does not say: CLIP's and SigLIP's usual size
# Families whose image tokens see each other. A missing one shows at start-up (model/packed/verify_images.py).
_BIDIRECTIONAL = {"gemma3": IMAGES_BIDIRECTIONAL, "paligemma": PROMPT_BIDIRECTIONAL}


def is_vision_language(config: PretrainedConfig) -> bool:
    """Whether transformers has a model for images and text of this config."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


@dataclass(frozen=True)
class VisionParts:
    """Names of the modules (and single parameters) of a model outside its language model; as few as possible."""

    tower: tuple[str, ...]
    projector: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.tower or self.projector)


def vision_parts(base: PreTrainedModel) -> VisionParts:
    """The parts of a bare model; both empty for a text model.

    A tower is a model of its own with a config of its own (vision, audio, image codes); what lies beside it and is not
    text is a projector, whatever its name.
    """
    if not is_vision_language(base.config) or base.config.is_encoder_decoder:
        return VisionParts((), ())
    text, towers = set(map(id, _text_parameters(base))), _towers(base, _TOWER_CONFIGS)
    parts: dict[str, list[str]] = {"tower": [], "projector": []}
    for name, part in _pure_parts(base, "", text, towers):
        if part != "text":
            parts[part].append(name)
    return VisionParts(tuple(parts["tower"]), tuple(parts["projector"]))


_OTHER_CONFIGS = ("audio", "vq")  # sounds, and the codes of generated images: nothing of a row passes through them
_TOWER_CONFIGS = ("vision", *_OTHER_CONFIGS)


def _towers(base: PreTrainedModel, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the models within `base` whose config is one of these kinds."""
    own = {name for name in base.config.sub_configs if any(kind in name for kind in kinds)}
    configs = [config for name in own if (config := config_value(base.config, name)) is not None]
    return tuple(
        name
        for name, module in base.named_modules()
        if name and isinstance(module, PreTrainedModel) and any(isinstance(module.config, type(c)) for c in configs)
    )


def _text_parameters(base: PreTrainedModel) -> Iterator[nn.Parameter]:
    for part in (base.get_decoder(), base.get_output_embeddings(), base.get_input_embeddings()):
        if part is not None:
            yield from part.parameters()


def _pure_parts(module: nn.Module, path: str, text: set[int], towers: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(name, part) of the outermost modules and parameters that belong to one part as a whole."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        kinds = {
            _part(f"{child_path}.{inner}", parameter, text, towers) for inner, parameter in child.named_parameters()
        }
        if len(kinds) == 1:
            yield child_path, kinds.pop()
        elif kinds:
            yield from _pure_parts(child, child_path, text, towers)
    for name, parameter in module.named_parameters(recurse=False):
        parameter_path = f"{path}.{name}" if path else name
        yield parameter_path, _part(parameter_path, parameter, text, towers)


def _part(path: str, parameter: nn.Parameter, text: set[int], towers: tuple[str, ...]) -> str:
    if id(parameter) in text:
        return "text"
    inside = any(path.startswith(f"{tower}.") for tower in towers)
    return "tower" if inside and not any(word in path for word in _IN_A_TOWER) else "projector"


def frozen_parts(base: PreTrainedModel, *, train_vision_tower: bool, train_projector: bool) -> tuple[str, ...]:
    """Names of the parts that do not train.

    Raises:
        UserError: a part is to train that the model does not have.
    """
    parts = vision_parts(base)
    for option, wanted, names in (
        ("train_vision_tower", train_vision_tower, parts.tower),
        ("train_projector", train_projector, parts.projector),
    ):
        if wanted and not names:
            raise UserError(f"{option}=true: {type(base).__name__} has no such part. Leave {option} out.")
    frozen_tower = parts.tower
    if train_vision_tower:
        frozen_tower = _towers(base, _OTHER_CONFIGS) + _behind_the_features(base, parts.tower)
    return frozen_tower + (() if train_projector else parts.projector)


def _behind_the_features(base: PreTrainedModel, tower: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of the tower after the last layer whose output is used (LLaVA's `vision_feature_layer`, which may be a
    list, and VipLLaVA's `vision_feature_layers`). They never get a gradient, and DDP would wait for one."""
    config = base.config.to_dict()
    given = config.get("vision_feature_layer", config.get("vision_feature_layers"))
    taken = [layer for layer in (given if isinstance(given, list | tuple) else [given]) if isinstance(layer, int)]
    inside = [name for name, _ in base.named_modules() if any(name.startswith(f"{part}.") for part in tower)]
    layers = [name for name in inside if re.search(r"encoder\.layers\.\d+$", name)]
    if not layers or not taken:
        return ()
    # hidden_states begins with the embeddings
    used = max(layer if layer >= 0 else len(layers) + 1 + layer for layer in taken)
    return (*layers[used:], *(name for name in inside if name.endswith("post_layernorm")))  # which hidden_states lack


def freeze(base: PreTrainedModel, names: tuple[str, ...]) -> None:
    for path, parameter in base.named_parameters():
        if any(path == name or path.startswith(f"{name}.") for name in names):
            parameter.requires_grad_(False)


def without_parts(peft_config: PeftConfig | None, names: tuple[str, ...]) -> PeftConfig | None:
    """The adapter settings with those parts excluded; unchanged if they already set exclude_modules, and for adapter
    types that do not select modules."""
    if not names or not isinstance(peft_config, LoraConfig) or peft_config.exclude_modules is not None:
        return peft_config
    config = copy.deepcopy(peft_config)
    config.exclude_modules = rf"({'|'.join(map(re.escape, names))})(\..*)?"
    return config


def vision_modules(base: PreTrainedModel) -> set[nn.Module]:
    """Every module of tower and projector."""
    parts = vision_parts(base)
    outermost = [module for name, module in base.named_modules() if name in parts.tower + parts.projector]
    return {inner for module in outermost for inner in module.modules()}


def trains_vision(base: PreTrainedModel) -> bool:
    """Whether the tower, the projector or an adapter in them trains."""
    text = set(map(id, _text_parameters(base)))
    return any(parameter.requires_grad and id(parameter) not in text for parameter in base.parameters())


def vision_cost(base: PreTrainedModel, pixels: int, image_tokens: int) -> float:
    """Work of the tower and the projector per image token, in units of one token through the language model.

    A linear layer costs 2 FLOPs per weight and token forward and as many again for each gradient, of its input and of
    its weight where it is trained. The tower works on patches, of which several make one image token.

    pixels: numbers in the pixel values of an image of `image_tokens` tokens.
    """
    in_vision, trained = vision_modules(base), trains_vision(base)
    head = base.get_output_embeddings()
    vision = language = 0.0
    for module in base.modules():
        if isinstance(module, nn.Linear) and module is not head:
            weights = module.in_features * module.out_features
            if module in in_vision:
                vision += weights * (3 if trained else 1)
            else:
                language += weights * (3 if module.weight.requires_grad else 2)
    return pixels / _numbers_per_patch(base) / max(image_tokens, 1) * vision / language if language else 0.0


def _numbers_per_patch(base: PreTrainedModel) -> int:
    """Of a patch that the tower takes; a usual number where the config does not say, since this is an estimate."""
    config = config_value(base.config, "vision_config")
    patch = None if config is None else config_value(config, "patch_size")
    sides = patch.values() if isinstance(patch, dict) else patch
    side = next(iter(sides), None) if isinstance(sides, Iterable) else sides
    if not isinstance(side, int):
        return _PER_PATCH
    times = config_value(config, "temporal_patch_size")  # of towers that take videos
    return 3 * side * side * (times if isinstance(times, int) else 1)


def refuse_images(base: PreTrainedModel) -> None:
    """Raises UserError for a model that cannot be trained on pairs with images, and why."""
    if base.config.is_encoder_decoder:
        reason = "is an encoder-decoder model, which is trained on text alone"
    elif not is_vision_language(base.config):  # its tower would train unasked, for nothing says where it is
        reason = "is not among transformers' models for images and text (AutoModelForImageTextToText)"
    elif config_value(base.config.get_text_config(), "cross_attention_layers"):
        # Llama 3.2 Vision: with a mask per token that neither layout writes
        reason = "reads images by cross-attention, which is not supported in training"
    else:
        return
    raise UserError(
        f"{type(base).__name__} {reason}. Choose another vision-language model, or set image_column='' to train on the "
        "text alone."
    )


def name_present_layers(model: nn.Module) -> list[Patched]:
    """Remove classes without a module in the model from `_no_split_modules`: FSDP2 wraps the classes listed there, and
    accelerate rejects a name that it does not find (LLaVA lists the text side of its CLIP tower)."""
    present = {type(module).__name__ for module in model.modules()}
    handles = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._no_split_modules:
            found = [name for name in module._no_split_modules if name in present]
            handles.append(replace_attribute(module, "_no_split_modules", found, PRESENT_LAYERS))
    return handles


def image_rules(base: PreTrainedModel) -> ImageRules:
    """The rules for the collator of a bare model."""
    inner = base.base_model
    positions = MropePositions(type(inner), inner.config) if computes_mrope_positions(type(inner)) else None
    return ImageRules(positions, _BIDIRECTIONAL.get(base.config.model_type, CAUSAL))


def widen_pixels(base: PreTrainedModel) -> list[Patched]:
    """Give the towers half-precision pixels in the precision of their weights (Llama 4's processor makes bfloat16)."""

    def cast(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        precision = next(p.dtype for p in module.parameters() if p.is_floating_point())

        def widened(value: Any) -> Any:
            half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
            return value.to(precision) if half else value

        return tuple(map(widened, args)), {name: widened(value) for name, value in kwargs.items()}

    towers = _towers(base, ("vision",))
    outermost = [name for name in towers if not any(name.startswith(f"{other}.") for other in towers)]
    return [add_forward_pre_hook(base.get_submodule(name), cast, WIDENED_PIXELS) for name in outermost]


def type_text_tokens(base: PreTrainedModel) -> list[Patched]:
    """Give Molmo 2 token types where a batch has none, for it has no image: in training it asks for them."""
    if base.config.model_type != "molmo2":
        return []

    def typed(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("mm_token_type_ids") is None and kwargs.get("input_ids") is not None:
            kwargs["mm_token_type_ids"] = torch.zeros_like(kwargs["input_ids"])
        return args, kwargs

    return [add_forward_pre_hook(base.base_model, typed, TOKEN_TYPES_OF_TEXT)]


def shares_features(base: PreTrainedModel) -> bool:
    """Whether `features_for_both` can be used: the model has the method that it replaces."""
    return has_image_features(type(base.base_model))


@contextmanager
def features_for_both(base: PreTrainedModel) -> Iterator[None]:
    """Within this block a padded batch of 2B rows takes the pixels of B prompts. The tower's features are used for the
    chosen rows and again for the rejected ones, which follow in the same order."""
    inner: Any = base.base_model
    own = inner.get_image_features

    def twice(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.pooler_output = _repeated(output.pooler_output)
        if output.get("deepstack_features") is not None:  # Qwen3-VL: per layer of the decoder, features of every image
            output.deepstack_features = [_repeated(layer) for layer in output.deepstack_features]
        return output

    with replace_attribute(inner, "get_image_features", twice, SHARED_FEATURES):
        yield


def _repeated(features: Any) -> Any:
    return torch.cat([features, features]) if isinstance(features, torch.Tensor) else [*features, *features]
