"""Patches of other libraries' objects: all named, all undoable, none outside model/patches.py."""

import ast
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AttentionInterface,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.integrations import deepspeed as deepspeed_integration

import orpo_dist
from orpo_dist.loss import Objective
from orpo_dist.model import patches
from orpo_dist.model.attention.interface import PACKED_ATTENTION, register_packed_attention
from orpo_dist.model.head.install import install_head
from orpo_dist.model.loading.adapters import disable_base_dropout, quiet_peft, record_base
from orpo_dist.model.loading.load import loading_whole_models
from orpo_dist.model.loading.vision import features_for_both, name_present_layers, type_text_tokens, widen_pixels
from orpo_dist.model.neftune import EmbeddingNoise
from orpo_dist.model.packed.compile import compile_blocks
from orpo_dist.model.packed.rotary import fix_rotary_frequencies
from orpo_dist.model.packed.switch import use_packed_layout
from orpo_dist.model.packed.verify import verify_layout
from orpo_dist.model.patches import PATCHES, Patched, replace_attribute, replace_item, undo_all
from orpo_dist.model.running_statistics import keep_running_statistics
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.training.deferred_writes import DeferredWrites
from tests.model.further_vlms import further_vlm
from tests.model.packing_reference import rows
from tests.model.tiny_models import HEADS, tiny_model

NAMES = {
    "packed attention function",
    "packed attention of a model",
    "temperature by own positions",
    "layout seen",
    "slice of a packed row",
    "mixer on unshared rows",
    "carried layout",
    "fixed rotary frequencies",
    "compiled block",
    "short window",
    "observed hidden states",
    "loss head",
    "stand-in for the output layer",
    "fused loss in the output layer",
    "loading without sharding",
    "commit of a model",
    "weights of a dequantised base",
    "base of an adapter",
    "dropout of the base",
    "4-bit weights stay unpacked",
    "peft's deprecation warning",
    "image features for both completions",
    "pixels in the tower's precision",
    "running statistics of batch norms",
    "token types of text",
    "present layers",
    "image options of a processor",
    "skipped step",
    "blocks are compiled already",
    "noise on the embeddings",
    "one device per process",
    "deferred write",
}


def test_every_patch_is_listed_with_reason_and_link():
    assert {patch.name for patch in PATCHES} == NAMES and len(PATCHES) == len(NAMES)
    for patch in PATCHES:
        assert patch.replaces and patch.undone and patch.reason.endswith("."), patch
        assert patch.link.startswith("https://"), patch


# ---------------------------------------------------------------- undone, an object is as it was


@pytest.fixture
def made(monkeypatch) -> list[Patched]:
    """Every handle that the test's code makes."""
    handles: list[Patched] = []
    own = Patched.__init__

    def noting(self: Patched, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        handles.append(self)

    monkeypatch.setattr(Patched, "__init__", noting)
    return handles


def _objects(owner: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(owner, nn.Module):
        for name, module in owner.named_modules():
            yield name, module
            if isinstance(module, PeftModel):
                yield f"{name} adapter", module.peft_config["default"]
            if isinstance(module, PreTrainedModel):
                yield f"{name} config", module.config
                yield from ((f"{name} {part}", getattr(module.config, part)) for part in module.config.sub_configs)
    else:
        yield "", owner


def state(owner: Any) -> dict[str, Any]:
    """Every attribute of an object, of a model's modules and configs, with the values of its buffers."""
    found = {}
    for where, one in _objects(owner):
        for name, value in vars(one).items():
            found[f"{where}.{name}"] = dict(value) if isinstance(value, dict) else value
    if isinstance(owner, nn.Module):
        found |= {f"{name} values": buffer.tolist() for name, buffer in owner.named_buffers()}
    return found


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        if isinstance(value, dict):
            assert list(value) == list(other) and all(value[key] is other[key] for key in value), name
        else:
            assert value is other or value == other, name


def _packed_step(model: nn.Module) -> None:
    """A switch, a check and a forward with the loss head."""
    verdict = use_packed_layout(model, max_length=64)
    assert verdict.ok
    install_head(model, Objective())
    batch = PackedCollator(True, "sequence")(rows())
    model(**batch).backward()
    model.zero_grad(set_to_none=True)
    assert verify_layout(model, verdict, prefix_sharing=True).ok


def _loading_whole(model: nn.Module) -> None:
    with loading_whole_models():
        pass


def _quiet(filters: Any) -> None:
    before = list(warnings.filters)
    with quiet_peft():
        assert warnings.filters != before
    assert list(warnings.filters) == before


def _collecting(library: Any) -> None:
    before = library.save_file
    with DeferredWrites().collecting():
        assert library.save_file is not before


def _both(model: nn.Module) -> None:
    with features_for_both(model):
        assert "get_image_features" in vars(model.base_model)


def _adapted() -> nn.Module:
    return get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear", r=4))


def _set(name: str, value: Any, patch: patches.Patch) -> Callable[[Any], Any]:
    return lambda owner: replace_attribute(owner, name, value, patch)


def _llama4() -> nn.Module:
    config = Llama4TextConfig(**HEADS, attention_chunk_size=64, num_local_experts=2, intermediate_size_mlp=32,
                              num_experts_per_tok=1, no_rope_layers=[1, 0], floor_scale=4)  # fmt: skip
    return Llama4ForCausalLM(config)


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def _unregistered() -> Any:
    AttentionInterface._global_mapping.pop(PACKED_ATTENTION)
    return SimpleNamespace(names=AttentionInterface._global_mapping)


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], set[patches.Patch]]] = {
    "packed step": (
        lambda: tiny_model("mistral"),
        _packed_step,
        {
            patches.PACKED_ATTENTION_OF_MODEL,
            patches.LAYOUT_SEEN,
            patches.SLICED_ROW,
            patches.SHORT_WINDOW,
            patches.OBSERVED_STATES,
            patches.LOSS_HEAD,
            patches.HEAD_STAND_IN,
            patches.HEAD_CALL,
        },
    ),
    "packed step of a hybrid": (lambda: tiny_model("qwen3_5"), _packed_step, {patches.UNSHARED_MIXER}),
    "packed step of layers that drop keywords": (
        lambda: tiny_model("stablelm"),
        _packed_step,
        {patches.CARRIED_LAYOUT},
    ),
    "packed step of layers with a temperature": (_llama4, _packed_step, {patches.OWN_TEMPERATURE}),
    "packed text of a vlm": (
        lambda: tiny_model("llava"),
        lambda model: use_packed_layout(model, max_length=64),
        {patches.PACKED_ATTENTION_OF_MODEL},
    ),
    "registration": (
        _unregistered,
        lambda _: register_packed_attention(),
        {patches.PACKED_ATTENTION_FUNCTION},
    ),
    "compiled blocks": (
        lambda: tiny_model("llama"),
        lambda model: compile_blocks(model, backend="eager"),
        {patches.COMPILED_BLOCK},
    ),
    "noise": (lambda: tiny_model("llama"), EmbeddingNoise(5.0, 0).attach, {patches.EMBEDDING_NOISE}),
    "loading": (lambda: deepspeed_integration, _loading_whole, {patches.WHOLE_MODEL_LOADING}),
    "commit": (
        lambda: tiny_model("llama").config,
        _set("_commit_hash", "0" * 40, patches.COMMIT_OF_MODEL),
        {patches.COMMIT_OF_MODEL},
    ),
    "dequantised": (
        lambda: tiny_model("llama"),
        _set("_weight_conversions", None, patches.DEQUANTISED_WEIGHTS),
        {patches.DEQUANTISED_WEIGHTS},
    ),
    "record of the base": (_adapted, record_base, {patches.BASE_OF_ADAPTER}),
    "dropout": (_adapted, disable_base_dropout, {patches.BASE_DROPOUT}),
    "4 bits": (
        lambda: nn.Linear(2, 2),
        _set("support_avx512bf16_for_cpu", False, patches.UNPACKED_4BIT),
        {patches.UNPACKED_4BIT},
    ),
    "warning": (lambda: SimpleNamespace(), _quiet, {patches.PEFT_WARNING}),
    "features": (lambda: tiny_model("llava"), _both, {patches.SHARED_FEATURES}),
    "present layers": (lambda: tiny_model("llava"), name_present_layers, {patches.PRESENT_LAYERS}),
    "pixels": (lambda: tiny_model("llava"), widen_pixels, {patches.WIDENED_PIXELS}),
    "token types": (lambda: further_vlm("Molmo 2")[1], type_text_tokens, {patches.TOKEN_TYPES_OF_TEXT}),
    "batch norms": (lambda: nn.Sequential(nn.BatchNorm2d(2)), keep_running_statistics, {patches.RUNNING_STATISTICS}),
    "image options": (
        lambda: SimpleNamespace(),
        _set("images_kwargs", {"do_pan_and_scan": True}, patches.FIXED_IMAGE_OPTIONS),
        {patches.FIXED_IMAGE_OPTIONS},
    ),
    "skipped step": (_optimizer, _set("step", print, patches.SKIPPED_STEP), {patches.SKIPPED_STEP}),
    "dynamo": (
        lambda: SimpleNamespace(dynamo_plugin=object()),
        _set("dynamo_plugin", None, patches.BLOCKS_COMPILED_ALREADY),
        {patches.BLOCKS_COMPILED_ALREADY},
    ),
    "devices": (
        lambda: SimpleNamespace(_n_gpu=4),
        _set("_n_gpu", 1, patches.ONE_DEVICE_PER_PROCESS),
        {patches.ONE_DEVICE_PER_PROCESS},
    ),
    "deferred writes": (lambda: safetensors.torch, _collecting, {patches.DEFERRED_WRITE}),
}


@pytest.mark.filterwarnings("ignore:.*falling back to its reference PyTorch implementation")
@pytest.mark.parametrize("case", CASES)
def test_undone_patch_leaves_the_object_as_it_was(case, made):
    build, act, expected = CASES[case]
    owner = build()
    before = state(owner)
    act(owner)
    assert expected <= {handle.patch for handle in made}
    undo_all(made)
    assert not made
    assert_same(state(owner), before)
    if case == "registration":
        register_packed_attention()  # which the tests that follow need
        assert PACKED_ATTENTION in AttentionInterface._global_mapping


def test_rotary_frequencies_move_again(made):
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = LlamaForCausalLM(LlamaConfig(**{**HEADS, "max_position_embeddings": 16}, rope_parameters=parameters))
    before = state(model)
    fixed = fix_rotary_frequencies(model, max_length=64)
    assert list(fixed) == ["model.rotary_emb"]
    assert {handle.patch for handle in made} == {patches.FIXED_ROTARY}
    assert state(model)["model.rotary_emb.inv_freq values"] != before["model.rotary_emb.inv_freq values"]
    undo_all(made)
    assert_same(state(model), before)


def test_cases_cover_every_patch():
    covered = set().union(*(expected for _, _, expected in CASES.values())) | {patches.FIXED_ROTARY}
    assert covered == set(PATCHES)


def test_verdict_undoes_the_head_that_was_appended():
    model = tiny_model("llama")
    before = state(model)
    verdict = use_packed_layout(model, max_length=64)
    verdict.patches.append(install_head(model, Objective()))
    verdict.undo()
    verdict.undo()
    assert not verdict.patches
    assert_same(state(model), before)


# ---------------------------------------------------------------- handles


def test_a_wrapper_on_top_is_not_lost():
    """accelerate wraps the forward for mixed precision, and takes its wrapper off at the end."""
    model = tiny_model("llama")
    head = install_head(model, Objective())
    ours = model.forward
    model.forward = MethodType(convert_outputs_to_fp32(ours.__func__), model)
    assert not head.undo() and head.in_force
    assert "forward" in vars(model)
    model.forward = ours
    assert head.undo() and not head.in_force
    assert "forward" not in vars(model)


def test_a_second_head_replaces_the_first():
    model = tiny_model("llama")
    first = install_head(model, Objective())
    second = install_head(model, Objective())
    assert not first.in_force
    second.undo()
    assert "forward" not in vars(model)


def test_attribute_and_item_come_back():
    class Owner:
        inherited = 1

    owner = Owner()
    owner.own = 2  # type: ignore[attr-defined]
    patch = PATCHES[0]
    handles = [replace_attribute(owner, "inherited", 3, patch), replace_attribute(owner, "own", 4, patch)]
    handles.append(replace_attribute(owner, "own", 5, patch))
    assert (owner.inherited, owner.own) == (3, 5)  # type: ignore[attr-defined]
    undo_all(handles)
    assert vars(owner) == {"own": 2} and owner.inherited == 1
    mapping = {"a": 1, "b": 2}
    with replace_item(mapping, "a", 3, patch), replace_item(mapping, "c", 4, patch):
        assert mapping == {"a": 3, "b": 2, "c": 4}
    assert list(mapping.items()) == [("a", 1), ("b", 2)]


# ---------------------------------------------------------------- no patch outside model/patches.py

ROOT = Path(orpo_dist.__file__).parent
# State of accelerate's optimizer that the step in force sets anew in each step; SKIPPED_STEP undoes the step itself.
# And of an HTTP connection of our own making, which is closed with it.
STATE = {
    "training/step_guard.py: optimizer._is_overflow = ...",
    "images/web.py: connection._create_connection = ...",
}
PATCHED_ATTRIBUTES = {
    "forward",
    "step",
    "generate",
    "dynamo_plugin",
    "sliding_window",
    "get_image_features",
    "rope_type",
}
OWN_OBJECTS = {"self", "cls", "trainer"}
HOOKS = ("register_forward", "register_full_backward", "register_load_state", "register_state_dict")


def _patches_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        stored = isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store)
        if stored and isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(("._modules", "_mapping")):
            yield f"{ast.unparse(node)} = ..."
        if stored and isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            private = node.attr.startswith("_") and not owner[0].isupper()  # a class of this package may set its own
            if owner not in OWN_OBJECTS and (private or node.attr in PATCHED_ATTRIBUTES):
                yield f"{ast.unparse(node)} = ..."
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "setattr" and ast.unparse(node.args[0]) not in OWN_OBJECTS:
                yield ast.unparse(node)
            if called.rpartition(".")[2].startswith(HOOKS):
                yield ast.unparse(node)


def test_nothing_is_patched_elsewhere():
    found = {
        f"{file.relative_to(ROOT).as_posix()}: {what}"
        for file in ROOT.rglob("*.py")
        if file != ROOT / "model" / "patches.py"
        for what in _patches_in(ast.parse(file.read_text()))
    }
    assert found == STATE, found - STATE


@pytest.mark.parametrize(
    "line",
    ["model.forward = f", "setattr(x, 'y', 1)", "m.register_forward_hook(h)", "m._modules['a'] = b", "a, b._c = d"],
)
def test_the_search_finds_what_it_must(line):
    assert len(list(_patches_in(ast.parse(line)))) == 1


@pytest.mark.parametrize("line", ["self._a = 1", "layout.tokens = 2", "setattr(self, name, value)"])
def test_the_search_leaves_own_objects_alone(line):
    assert not list(_patches_in(ast.parse(line)))
