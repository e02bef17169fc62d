"""Switch a model to the packed layout and back.

    verdict = use_packed_layout(model, max_length=1024)
    if verdict.ok:
        model(input_ids=..., position_ids=..., orpo_layout=..., use_cache=False)   # no attention_mask
    else:
        log(verdict.reason)                                                        # and keep the padded layout
    verdict.restore()                                                              # before generate()
    verdict.put_on()                                                               # and packed again

What cannot be seen from outside (a window that only the masks contain, positions computed inside the model) is found by
`verify_layout` (model/packed/verify.py), which every run calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from orpo_dist.model.attention.interface import PACKED_ATTENTION
from orpo_dist.model.packed.carried import layout_carriers
from orpo_dist.model.packed.mixers import PackedRow, TokenMixer, Unsharing, find_token_mixers
from orpo_dist.model.packed.rotary import fix_rotary_frequencies
from orpo_dist.model.packed.slices import SliceRow
from orpo_dist.model.packed.temperature import own_temperatures
from orpo_dist.model.patches import OWN_TEMPERATURE, PACKED_ATTENTION_OF_MODEL, Patched, replace_attribute, undo_all
from orpo_dist.model.upstream import config_value, has_window_in_masks_alone, text_model_of


@dataclass
class PackingVerdict:
    """Whether a model takes the packed layout.

    ok: it has been switched to it. reason: why not; empty when ok.
    unshared: mixers that run on unshared rows, by name; the prompt is computed twice in them.
    fixed_rotary: rotary embeddings whose frequencies were fixed for max_length.
    patches: what is in force on the model for this layout.
    makers: put those patches on; that of a loss head may be appended.
    rotary_patches: those of fixed_rotary.
    max_length: the longest sequence of the data, None for no bound.
    """

    ok: bool
    reason: str = ""
    unshared: list[str] = field(default_factory=list)
    fixed_rotary: list[str] = field(default_factory=list)
    patches: list[Patched] = field(default_factory=list)
    makers: list[Callable[[], list[Patched]]] = field(default_factory=list)
    rotary_patches: list[Patched] = field(default_factory=list)
    max_length: int | None = None

    def put_on(self) -> None:
        """Switch the model to the packed layout, after restore(). Cheap: names and hooks, no look at the model."""
        for make in self.makers:
            self.patches += make()

    def restore(self) -> None:
        """Undo `patches`: the model has its own attention and mixers again. Rotary frequencies stay fixed, which the
        padded layout needs too. Harmless when not ok, and a second time."""
        undo_all(self.patches)

    def undo(self) -> None:
        """restore(), and rotary frequencies that follow the length again: the model as it came."""
        self.restore()
        undo_all(self.rotary_patches)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The model with its own attention, for generate() or a padded forward while it is packed. Mixers need no
        pause: without a layout they run as they are. Backward passes of packed forwards must have finished."""
        attention = (PACKED_ATTENTION_OF_MODEL, OWN_TEMPERATURE)
        in_force = [handle for handle in self.patches if handle.patch in attention and handle.in_force]
        undo_all([*in_force])
        try:
            yield
        finally:
            if in_force:
                self.patches += self.makers[0]()


def use_packed_layout(model: nn.Module, *, max_length: int | None) -> PackingVerdict:
    """Switch `model` (bare, or wrapped by PEFT) to the packed layout, or say why it cannot take it.

    Only the text model changes; a vision tower keeps its attention. max_length: the longest P + C or P + R of the
    data, None for no bound.
    """
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    text_model = text_model_of(base)
    mixers = find_token_mixers(text_model)
    reason = _obstacle(base, text_model, mixers, max_length)
    if reason:
        return PackingVerdict(ok=False, reason=f"{type(base).__name__}: {reason}")
    fixed_rotary = fix_rotary_frequencies(text_model, max_length)
    configs = _configs_to_switch(base)
    row, own_temperature = PackedRow(text_model), own_temperatures(text_model)
    unshared = [mixer for mixer in mixers if not mixer.uses_interface]
    verdict = PackingVerdict(
        ok=True,
        unshared=[mixer.name for mixer in unshared],
        fixed_rotary=list(fixed_rotary),
        makers=[
            lambda: [*(_packed_attention_in(config) for config in configs), *own_temperature()],
            row.put_on,
            SliceRow(text_model).put_on,
        ],
        rotary_patches=[handle for handles in fixed_rotary.values() for handle in handles],
        max_length=max_length,
    )
    verdict.makers += [Unsharing(mixer, row).put_on for mixer in unshared]
    verdict.makers += [carrier.put_on for carrier in layout_carriers(text_model, [mixer.name for mixer in mixers])]
    verdict.put_on()
    return verdict


def _configs_to_switch(base: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs in which transformers, asked for the packed attention, changes a name. They are as before when this
    returns: a step sets and resets the names alone, since transformers' own switch walks through all modules."""
    own, names = _implementations(base.config), [(config, config._attn_implementation) for config in _configs(base)]
    base.set_attn_implementation(_packed_implementations(base.config))
    changed = [config for config, name in names if config._attn_implementation != name]
    base.set_attn_implementation(own)
    return changed


def _packed_attention_in(config: PreTrainedConfig) -> Patched:
    """In this config alone: the property without `_internal` writes into the configs within it too."""
    return replace_attribute(config, "_attn_implementation_internal", PACKED_ATTENTION, PACKED_ATTENTION_OF_MODEL)


def _configs(base: PreTrainedModel) -> list[PreTrainedConfig]:
    """Of the model and of the models in it, each with the configs within it, once."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: PreTrainedConfig) -> None:
        found[id(config)] = config
        for name in config.sub_configs:
            if getattr(config, name) is not None:
                add(getattr(config, name))

    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            add(module.config)
    return list(found.values())


def _obstacle(
    base: PreTrainedModel, text_model: PreTrainedModel, mixers: list[TokenMixer], max_length: int | None
) -> str | None:
    if base.config.is_encoder_decoder:
        return "an encoder-decoder model shares no row between prompt and completion"
    if not mixers:
        return "no attention or other token mixer was recognised in it"
    if not text_model._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface (ALiBi and older models)"
    nested = next((mixer for mixer in mixers if mixer.inner is not None), None)
    if nested is not None:
        return f"{nested.name} holds another token mixer ({nested.inner}), which is not packed"
    chunk = text_model.config.to_dict().get("attention_chunk_size")
    if chunk is not None and (max_length is None or max_length > chunk):
        return f"chunked attention (attention_chunk_size={chunk}) within max_length={max_length} is not packed"
    window = config_value(text_model.config, "sliding_window")
    slides = "sliding_attention" in (config_value(text_model.config, "layer_types") or ["sliding_attention"])
    if window and slides and (max_length is None or max_length > window):
        attention = [type(mixer.module) for mixer in mixers if mixer.uses_interface]
        if has_window_in_masks_alone(type(text_model), attention):
            return f"its sliding window of {window} tokens is in its masks alone, which a packed row has none of"
    return None


def _implementations(config: PreTrainedConfig) -> dict:
    """The attention implementation of a config and, nested, of its parts, as set_attn_implementation takes them."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    return {
        "": config._attn_implementation,
        **{name: _flat(_implementations(part)) for name, part in parts.items() if part is not None},
    }


def _flat(implementations: dict) -> dict | str:
    """A part without sub-configs by its plain name: transformers 5.17 does not accept nested dicts."""
    return implementations[""] if len(implementations) == 1 else implementations


def _packed_implementations(config: PreTrainedConfig) -> dict:
    """The same, with the text config and the configs around it (which make its masks) set to the packed attention."""
    text = config.get_text_config(decoder=True)
    result = _implementations(config)
    result[""] = PACKED_ATTENTION
    for name in config.sub_configs:
        part = getattr(config, name)
        if part is not None and _holds(part, text):
            result[name] = _flat(_packed_implementations(part))
    return result


def _holds(config: PreTrainedConfig, text: PreTrainedConfig) -> bool:
    if config is text:
        return True
    return any(_holds(part, text) for name in config.sub_configs if (part := getattr(config, name)) is not None)
