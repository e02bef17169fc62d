"""Every patch of another library's objects: what it replaces, why, where upstream, and how it is undone.

    handle = replace_attribute(model, "forward", with_head, LOSS_HEAD)
    ...
    handle.undo()                      # or: with replace_attribute(...):

A patch replaces an attribute or method that its owner does not offer as a setting (on an instance, a class or a
module), adds a hook, or registers a function under a name. Values that an object holds for its user to set are not
patches: weights and `requires_grad`, optimizer state, a tokenizer's pad token, DeepSpeed's configuration.

`PATCHES` lists them all. tests/model/test_patches.py checks that no other module patches anything, and that undoing
each patch leaves the object as it was.
"""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_TRANSFORMERS = "https://github.com/huggingface/transformers/blob/main/src/transformers"
_ACCELERATE = "https://github.com/huggingface/accelerate/blob/main/src/accelerate"
_TORCH_MODULE = "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html"


@dataclass(frozen=True)
class Patch:
    """name: unique. replaces: whose attribute, as its library names it. reason: why the library's own value does not
    do. link: the place upstream. undone: when."""

    name: str
    replaces: str
    reason: str
    link: str
    undone: str


# ---------------------------------------------------------------- the packed layout

PACKED_ATTENTION_FUNCTION = Patch(
    name="packed attention function",
    replaces="AttentionInterface: the entry orpo_packed",
    reason="Models look up their attention function by name.",
    link="https://huggingface.co/docs/transformers/attention_interface",
    undone="never: one more name does not change a model that does not ask for it",
)
PACKED_ATTENTION_OF_MODEL = Patch(
    name="packed attention of a model",
    replaces="PreTrainedConfig._attn_implementation_internal of the text model and of the configs around it",
    reason="The two sequences of a pair share their prompt, and no mask is to be built for them.",
    link=f"{_TRANSFORMERS}/modeling_utils.py",
    undone="after each micro-batch (LayoutChoice.in_force); by PackingVerdict.restore(), and within paused()",
)
OWN_TEMPERATURE = Patch(
    name="temperature by own positions",
    replaces="attn_temperature_tuning of Llama 4's layers without rotary positions, and orpo_query_scale, new on them",
    reason="They scale queries by the place in the row, which is no position of the sequence in a packed one.",
    link=f"{_TRANSFORMERS}/models/llama4/modeling_llama4.py",
    undone="after each micro-batch (LayoutChoice.in_force); by PackingVerdict.restore(), and within paused()",
)
LAYOUT_SEEN = Patch(
    name="layout seen",
    replaces="forward pre-hooks of the text model",
    reason="A layer that receives no layout must fail if its model was given one.",
    link=_TORCH_MODULE,
    undone="after each micro-batch (LayoutChoice.in_force); by PackingVerdict.restore()",
)
UNSHARED_MIXER = Patch(
    name="mixer on unshared rows",
    replaces="forward hooks of linear attention, Mamba and convolution layers",
    reason="They do not call the attention interface: the row has to be copied out to plain sequences around them.",
    link=_TORCH_MODULE,
    undone="after each micro-batch (LayoutChoice.in_force); by PackingVerdict.restore()",
)
SLICED_ROW = Patch(
    name="slice of a packed row",
    replaces="forward hooks of the text model, where several ranks share a row",
    reason="Its layers run on this rank's slice of the row; what stands before them (images) needs all of it.",
    link=_TORCH_MODULE,
    undone="after each micro-batch (LayoutChoice.in_force); by PackingVerdict.restore()",
)
CARRIED_LAYOUT = Patch(
    name="carried layout",
    replaces="forward of decoder layers that give their attention or mixer no keywords",
    reason="The layout, a keyword of the layer, has to reach the attention in it.",
    link=f"{_TRANSFORMERS}/models/stablelm/modeling_stablelm.py",
    undone="by PackingVerdict.restore()",
)
FIXED_ROTARY = Patch(
    name="fixed rotary frequencies",
    replaces="inv_freq, attention_scaling and rope_type of rotary embeddings of kind dynamic and longrope",
    reason="Frequencies that follow the longest position of a forward depend on how the batch is cut.",
    link=f"{_TRANSFORMERS}/modeling_rope_utils.py",
    undone="after train(); by PackingVerdict.undo(). restore() keeps them: the padded layout needs them too",
)
COMPILED_BLOCK = Patch(
    name="compiled block",
    replaces="forward (transformers from 5.19 on) or Module._compiled_call_impl of the decoder blocks",
    reason="Blocks are compiled one by one, inside activation checkpointing.",
    link=f"{_TRANSFORMERS}/modeling_layers.py",
    undone="after train(), by the handles that compile_blocks() returns",
)
SHORT_WINDOW = Patch(
    name="short window",
    replaces="sliding_window of the text config and of attention layers",
    reason="The start-up check uses short rows, which would not reach the model's own window.",
    link=f"{_TRANSFORMERS}/masking_utils.py",
    undone="after the start-up check",
)
OBSERVED_STATES = Patch(
    name="observed hidden states",
    replaces="forward hooks of the text model, its blocks and its token mixers",
    reason="The start-up check compares the layouts layer by layer, and lets every layer start from the same states.",
    link=_TORCH_MODULE,
    undone="after the forward of the start-up check",
)

# ---------------------------------------------------------------- the loss head

LOSS_HEAD = Patch(
    name="loss head",
    replaces="forward of a causal language model",
    reason="The model returns the loss of a packed row instead of its logits, which would not fit in memory.",
    link=f"{_TRANSFORMERS}/loss/loss_utils.py",
    undone="after each micro-batch (LayoutChoice.in_force); by the handle that install_head() returns",
)
HEAD_STAND_IN = Patch(
    name="stand-in for the output layer",
    replaces="the output layer in its parent's _modules",
    reason="The model's own forward runs up to the hidden states and forms no logits.",
    link=_TORCH_MODULE,
    undone="after the model's own forward, in every step",
)
HEAD_CALL = Patch(
    name="fused loss in the output layer",
    replaces="forward of the output layer and of lora_B on it",
    reason="ZeRO-3 and FSDP2 gather a layer's weight by hooks of its call, so the loss is computed inside that call.",
    link="https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html",
    undone="after the call, in every step",
)

EMBEDDING_NOISE = Patch(
    name="noise on the embeddings",
    replaces="forward hooks of the input embeddings",
    reason="neftune_noise_alpha: transformers' own hook takes a packed row for one sequence.",
    link=f"{_TRANSFORMERS}/integrations/neftune.py",
    undone="after train()",
)

# ---------------------------------------------------------------- loading, adapters, vision

WHOLE_MODEL_LOADING = Patch(
    name="loading without sharding",
    replaces="transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref",
    reason="What one rank loads alone must be whole, although ZeRO-3 is set up in this process.",
    link=f"{_TRANSFORMERS}/integrations/deepspeed.py",
    undone="after loading",
)
COMMIT_OF_MODEL = Patch(
    name="commit of a model",
    replaces="PreTrainedConfig._commit_hash",
    reason="transformers 5.17 records the commit here, later versions do not, and an adapter names its base by it.",
    link=f"{_TRANSFORMERS}/configuration_utils.py",
    undone="never: it is left out of saved configs",
)
DEQUANTISED_WEIGHTS = Patch(
    name="weights of a dequantised base",
    replaces="PreTrainedModel._weight_conversions",
    reason="The conversions of the quantised format cannot be reversed when the plain weights are saved.",
    link=f"{_TRANSFORMERS}/core_model_loading.py",
    undone="never: the base is dequantised for good",
)
BASE_OF_ADAPTER = Patch(
    name="base of an adapter",
    replaces="PeftConfig.base_model_name_or_path and revision",
    reason="peft records the path that was loaded, which may be a cache folder, and no commit.",
    link="https://github.com/huggingface/peft/blob/main/src/peft/config.py",
    undone="never: it is saved with the adapter",
)
BASE_DROPOUT = Patch(
    name="dropout of the base",
    replaces="p of dropout modules, and dropout probabilities that layers and configs hold as numbers",
    reason="disable_dropout, as in TRL; an adapter's dropout stays.",
    link="https://github.com/huggingface/trl/blob/main/trl/trainer/utils.py",
    undone="after train(), by the handles that disable_base_dropout() returns",
)
UNPACKED_4BIT = Patch(
    name="4-bit weights stay unpacked",
    replaces="bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu",
    reason="An evaluation would pack the weights for a kernel without a backward, and gradients would stop there.",
    link="https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/modules.py",
    undone="never: the adapter trains as long as the model lives",
)
PEFT_WARNING = Patch(
    name="peft's deprecation warning",
    replaces="warnings.filters",
    reason="peft 0.21 reads is_gradient_checkpointing, which transformers 5.23 renamed; users cannot change that.",
    link="https://github.com/huggingface/peft/blob/main/src/peft/peft_model.py",
    undone="after peft's call",
)
SHARED_FEATURES = Patch(
    name="image features for both completions",
    replaces="get_image_features of a vision-language model",
    reason="The vision tower runs once for the chosen and the rejected row of a pair.",
    link=f"{_TRANSFORMERS}/models/llava/modeling_llava.py",
    undone="after the padded forward",
)
WIDENED_PIXELS = Patch(
    name="pixels in the tower's precision",
    replaces="forward pre-hooks of vision towers",
    reason="Llama 4's processor makes bfloat16, which weights in float32 refuse outside of autocast.",
    link=f"{_TRANSFORMERS}/models/llama4/image_processing_llama4.py",
    undone="never: the processor makes them so as long as the model lives",
)
TOKEN_TYPES_OF_TEXT = Patch(
    name="token types of text",
    replaces="forward pre-hooks of the inner model",
    reason="Molmo 2 refuses to train without mm_token_type_ids, which rows without images do not have.",
    link=f"{_TRANSFORMERS}/models/molmo2/modeling_molmo2.py",
    undone="after train(), by the handles that type_text_tokens() returns",
)
RUNNING_STATISTICS = Patch(
    name="running statistics of batch norms",
    replaces="forward pre-hooks of batch norms",
    reason="In training mode a pair's features would depend on its micro-batch, and a frozen tower would change.",
    link="https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html",
    undone="after train(), by the handles that keep_running_statistics() returns",
)
PRESENT_LAYERS = Patch(
    name="present layers",
    replaces="PreTrainedModel._no_split_modules",
    reason="accelerate refuses to wrap for FSDP2 if a class named there is not in the model.",
    link=f"{_ACCELERATE}/utils/fsdp_utils.py",
    undone="after train(), by the handles that name_present_layers() returns",
)
FIXED_IMAGE_OPTIONS = Patch(
    name="image options of a processor",
    replaces="images_kwargs of a processor class",
    reason="What the class fixes would override the options of the run (Gemma 3: do_pan_and_scan).",
    link=f"{_TRANSFORMERS}/models/gemma3/processing_gemma3.py",
    undone="never: the options are saved with the processor",
)

# ---------------------------------------------------------------- the training loop

SKIPPED_STEP = Patch(
    name="skipped step",
    replaces="AcceleratedOptimizer.step and _is_overflow",
    reason="A step whose gradient norm is not finite must not be applied, nor move the learning rate.",
    link=f"{_ACCELERATE}/optimizer.py",
    undone="after train()",
)
BLOCKS_COMPILED_ALREADY = Patch(
    name="blocks are compiled already",
    replaces="AcceleratorState.dynamo_plugin",
    reason="accelerate would compile the whole model around blocks that compile_blocks() has compiled.",
    link=f"{_ACCELERATE}/accelerator.py",
    undone="never: evaluate() and predict() prepare the model again, before and after train()",
)
ONE_DEVICE_PER_PROCESS = Patch(
    name="one device per process",
    replaces="TrainingArguments._n_gpu",
    reason="With several GPUs and one process the Trainer would use DataParallel, which splits pairs.",
    link=f"{_TRANSFORMERS}/trainer.py",
    undone="never: it belongs to the arguments of this trainer",
)
DEFERRED_WRITE = Patch(
    name="deferred write",
    replaces="torch.save, safetensors' save_file and torch.distributed.checkpoint.FileSystemWriter",
    reason="async_save: the libraries write a checkpoint in place, and it is to be written beside the training.",
    link="https://github.com/pytorch/pytorch/blob/main/torch/serialization.py",
    undone="once the files of a checkpoint have been collected",
)

PATCHES: tuple[Patch, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Patch))


# ---------------------------------------------------------------- putting a patch in force, and undoing it

_ABSENT: Any = object()


class Patched:
    """A patch in force on one object.

    restore puts the original back. is_outermost tells whether the owner still holds the patch itself: another library
    may have wrapped it since (accelerate wraps a forward for mixed precision), and that wrapper must not be lost.
    """

    def __init__(self, patch: Patch, restore: Callable[[], object], is_outermost: Callable[[], bool] = lambda: True):
        self.patch = patch
        self.in_force = True
        self._restore, self._is_outermost = restore, is_outermost

    def undo(self) -> bool:
        """Restore the original, once. False if another wrapper is on top: nothing changes, and a later call tries
        again."""
        if self.in_force and self._is_outermost():
            self._restore()
            self.in_force = False
        return not self.in_force

    def __enter__(self) -> "Patched":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<{self.patch.name}{'' if self.in_force else ', undone'}>"


def undo_all(handles: list[Patched]) -> None:
    """Undo in reverse order. Those that cannot be undone yet stay in `handles`."""
    handles[:] = [handle for handle in reversed(handles) if not handle.undo()][::-1]


def replace_attribute(owner: Any, name: str, value: Any, patch: Patch) -> Patched:
    """Set `owner.name` (an instance, a class or a module of Python). Undone, an attribute that the owner inherited is
    inherited again."""
    before = vars(owner).get(name, _ABSENT)

    def restore() -> None:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    setattr(owner, name, value)
    return Patched(patch, restore, lambda: vars(owner).get(name, _ABSENT) is value)


def replace_item(mapping: MutableMapping[str, Any], key: str, value: Any, patch: Patch) -> Patched:
    """Set `mapping[key]`, which may be new."""
    before = mapping.get(key, _ABSENT)

    def restore() -> None:
        if before is _ABSENT:
            del mapping[key]
        else:
            mapping[key] = before

    mapping[key] = value
    return Patched(patch, restore, lambda: mapping.get(key, _ABSENT) is value)


def add_forward_hook(module: nn.Module, hook: Callable[..., Any], patch: Patch) -> Patched:
    """`hook(module, args, output)` after every forward of `module`."""
    return Patched(patch, module.register_forward_hook(hook).remove)


def add_forward_pre_hook(module: nn.Module, hook: Callable[..., Any], patch: Patch, *, first: bool = False) -> Patched:
    """`hook(module, args, kwargs)` before every forward of `module`; `first`: before its other hooks."""
    return Patched(patch, module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first).remove)
