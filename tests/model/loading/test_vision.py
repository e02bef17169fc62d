"""Parts of a vision-language model: what trains, what an adapter covers, what is quantised; its processor."""

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from orpo_dist.errors import UserError
from orpo_dist.model.loading.load import load_model
from orpo_dist.model.loading.processor import ImageSizes, load_processing_class, set_image_sizes
from orpo_dist.model.loading.vision import (
    freeze,
    frozen_parts,
    is_vision_language,
    refuse_images,
    trains_vision,
    type_text_tokens,
    vision_cost,
    vision_parts,
    widen_pixels,
    without_parts,
)
from orpo_dist.packing.images import process_prompts
from tests.model.further_vlms import further_vlm
from tests.model.tiny_models import tiny_model
from tests.model.tiny_vlms import (
    FAMILIES,
    TOWER,
    _ids,
    _llava_processor,
    _text,
    drawing,
    image_rows,
    tiny_processor,
    tiny_vlm,
    tokenizer,
)

PROJECTORS = {
    "qwen2_vl": ("model.visual.merger",),
    "qwen2_5_vl": ("model.visual.merger",),
    "qwen3_vl": ("model.visual.deepstack_merger_list", "model.visual.merger"),
    "qwen3_5": ("model.visual.merger",),
    "llava": ("model.multi_modal_projector",),
    "llava_next": ("model.image_newline", "model.multi_modal_projector"),
    "llava_onevision": ("model.image_newline", "model.multi_modal_projector"),
    "idefics3": ("model.connector",),
    "smolvlm": ("model.connector",),
    "gemma3": ("model.multi_modal_projector",),
    "paligemma": ("model.multi_modal_projector",),
    "internvl": ("model.multi_modal_projector",),
    "mistral3": ("model.multi_modal_projector",),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_belongs_to_one_part(name):
    model = tiny_vlm(name)
    parts = vision_parts(model)
    assert tuple(sorted(parts.projector)) == PROJECTORS[name]
    assert parts.tower
    freeze(model, frozen_parts(model, train_vision_tower=False, train_projector=False))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    text = {id(p) for p in [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]}
    assert trained == text and not trains_vision(model)


@pytest.mark.parametrize("tower, projector", [(True, False), (False, True), (True, True)])
def test_parts_train_when_asked_for(tower, projector):
    model = tiny_vlm("qwen2_5_vl")
    freeze(model, frozen_parts(model, train_vision_tower=tower, train_projector=projector))
    assert model.model.visual.blocks[0].attn.qkv.weight.requires_grad == tower
    assert model.model.visual.merger.mlp[0].weight.requires_grad == projector
    assert model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad
    assert trains_vision(model)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen2_vl", "idefics3", "gemma3"])
def test_every_trained_parameter_of_a_tower_gets_a_gradient(name):
    """LLaVA takes the features before the last layer: DDP would wait for gradients of what comes after it."""
    model, row = tiny_vlm(name), image_rows(name)[0]
    freeze(model, frozen_parts(model, train_vision_tower=True, train_projector=True))
    processed = process_prompts(tiny_processor(name), [row])
    kinds = {kind: types[0][None] for kind, types in processed.token_types.items()}
    model(input_ids=torch.tensor([row["prompt_ids"]]), **processed.tensors, **kinds).logits.square().sum().backward()
    without = [
        path for path, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []
    assert any(parameter.grad is not None for path, parameter in model.named_parameters() if "vis" in path)


PARTS = {  # of families whose projectors have names of their own: (towers, projectors)
    "blip-2": ({"vision_model"}, {"qformer", "language_projection", "query_tokens"}),
    "ovis2": ({"model.vision_tower"}, {"model.visual_embeddings_table"}),
    "idefics2": ({"model.vision_model"}, {"model.connector"}),
    "deepseek_vl": ({"model.vision_model"}, {"model.aligner"}),
    "kosmos-2": ({"vision_model"}, {"image_to_text_projection"}),
    "qwen2_5_omni_thinker": (
        {"model.audio_tower", "model.visual.patch_embed", "model.visual.blocks"}, {"model.visual.merger"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_found_by_what_they_are(name):
    """On the meta device, by the default config."""
    config = next(c for c in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if c.model_type == name)
    with torch.device("meta"):
        model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config](config())
    parts = vision_parts(model)
    assert (set(parts.tower), set(parts.projector)) == PARTS[name]
    sounds = {part for part in parts.tower if "audio" in part}
    assert sounds <= set(frozen_parts(model, train_vision_tower=True, train_projector=True))


def vipllava(layers: list[int]):
    tower = t.CLIPVisionConfig(**TOWER | {"num_hidden_layers": 4}, image_size=16)
    text = t.LlamaConfig(**_text(tokenizer()))
    return t.VipLlavaForConditionalGeneration(
        t.VipLlavaConfig(text_config=text, vision_config=tower, vision_feature_layers=layers, image_token_index=4)
    )


@pytest.mark.parametrize(("layers", "unused"), [([-3, -2], {3}), ([1, 2], {2, 3}), ([-1, 1], set())])
def test_what_lies_behind_the_last_of_several_feature_layers(layers, unused):
    frozen = frozen_parts(vipllava(layers), train_vision_tower=True, train_projector=True)
    assert {int(name.rsplit(".", 1)[-1]) for name in frozen if not name.endswith("post_layernorm")} == unused
    assert any(name.endswith("post_layernorm") for name in frozen)


def test_a_cost_whose_numbers_the_config_lacks():
    model = tiny_vlm("llava")
    model.config.vision_config.patch_size = None
    assert 0 < vision_cost(model, pixels=3 * 16 * 16, image_tokens=0) < float("inf")
    model.config.vision_config.patch_size = (4, 4)
    known = vision_cost(model, pixels=3 * 16 * 16, image_tokens=16)
    model.config.vision_config.patch_size = 4
    assert vision_cost(model, pixels=3 * 16 * 16, image_tokens=16) == known
    assert vision_cost(tiny_model("gpt2"), pixels=0, image_tokens=1) == 0.0


def test_half_precision_pixels_reach_a_tower_in_its_precision():
    """Llama 4's processor makes bfloat16, and its model leaves them so."""
    model = tiny_vlm("llava").eval()
    tower, pixels = model.model.vision_tower, torch.randn(1, 3, 16, 16).bfloat16()
    expected = tower(pixel_values=pixels.float()).last_hidden_state
    seen = []
    tower.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    (handle,) = widen_pixels(model)
    handle.undo()
    tower(pixel_values=pixels)
    (handle,) = widen_pixels(model)
    assert torch.equal(tower(pixel_values=pixels).last_hidden_state, expected)
    assert handle.undo() and seen[0].dtype == torch.bfloat16


def test_text_has_token_types_where_training_asks_for_them():
    model = further_vlm("Molmo 2")[1]
    ids = torch.tensor([[10, 11, 12]])
    with pytest.raises(ValueError, match="`mm_token_type_ids` is required"):
        model(input_ids=ids)
    (handle,) = type_text_tokens(model)
    found = model(input_ids=ids).logits
    assert handle.undo() and torch.equal(model.eval()(input_ids=ids).logits, found)
    assert type_text_tokens(tiny_vlm("llava")) == []


SMALL_T5 = t.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: t.T5ForConditionalGeneration(SMALL_T5), "T5ForConditionalGeneration is an encoder-decoder model"),
        (lambda: tiny_model("llama"), "LlamaForCausalLM is not among transformers' models for images and text"),
    ],
)  # fmt: skip
def test_images_are_refused(build, reason):
    with pytest.raises(UserError, match=reason):
        refuse_images(build())
    refuse_images(tiny_vlm("llava"))


def test_a_text_model_has_no_parts():
    model = tiny_model("llama")
    assert not vision_parts(model) and frozen_parts(model, train_vision_tower=False, train_projector=False) == ()
    with pytest.raises(UserError, match="train_projector=true: LlamaForCausalLM has no such part"):
        frozen_parts(model, train_vision_tower=False, train_projector=True)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "gemma3", "idefics3"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(q_proj|qkv|fc1)"])
@pytest.mark.parametrize("tower, projector", [(False, False), (True, False), (False, True)])
def test_an_adapter_covers_the_parts_that_train(name, targets, tower, projector):
    model = tiny_vlm(name)
    parts = vision_parts(model)
    frozen = frozen_parts(model, train_vision_tower=tower, train_projector=projector)
    given = LoraConfig(r=2, target_modules=targets)
    adapted = get_peft_model(model, without_parts(given, frozen))
    assert given.exclude_modules is None
    names = [name.removeprefix("base_model.model.") for name, p in adapted.named_parameters() if p.requires_grad]

    def covers(prefixes):
        return any(name.startswith(f"{prefix}.") for name in names for prefix in prefixes)

    assert any("layers.0.self_attn.q_proj" in name and not covers([]) for name in names)
    assert covers(parts.tower) == (tower and (name != "qwen2_5_vl" or targets != ["q_proj", "v_proj"]))
    assert covers(parts.projector) == (projector and targets == "all-linear" and name != "gemma3")


def test_own_exclusions_of_an_adapter_stay():
    config = LoraConfig(exclude_modules=["lm_head"])
    assert without_parts(config, ("model.visual",)) is config


def test_cost_of_an_image_token():
    """LLaVA's tower of one token per patch: its linear layers forward, against three times the language model's."""
    model = tiny_vlm("llava")
    freeze(model, frozen_parts(model, train_vision_tower=False, train_projector=False))

    def weights(module):
        return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, torch.nn.Linear))

    vision = weights(model.model.vision_tower) + weights(model.model.multi_modal_projector)
    expected = vision / (3 * weights(model.model.language_model))
    assert vision_cost(model, pixels=3 * 16 * 16, image_tokens=16) == pytest.approx(expected)
    trained = tiny_vlm("llava")
    assert vision_cost(trained, pixels=3 * 16 * 16, image_tokens=16) == pytest.approx(3 * expected)


# ---------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    """Wide enough for blocks of 64 weights, which bitsandbytes quantises."""
    folder = tmp_path_factory.mktemp("llava")
    tok = tokenizer()
    processor = _llava_processor(tok)
    torch.manual_seed(0)
    wide = {"hidden_size": 64, "intermediate_size": 128}
    model = t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config=t.LlamaConfig(**_text(tok) | wide),
            vision_config=t.CLIPVisionConfig(**TOWER | wide | {"num_hidden_layers": 2}, image_size=16),
            **_ids(tok, image_token_index="image_token"),
        )
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_vision_language_model_and_its_processor_load(llava_folder):
    model = load_model(str(llava_folder))
    assert isinstance(model, t.LlavaForConditionalGeneration) and is_vision_language(model.config)
    processor = load_processing_class(str(llava_folder))
    assert isinstance(processor, t.LlavaProcessor) and processor.tokenizer.pad_token == "<pad>"


def test_4_bits_take_the_language_model_alone(llava_folder):
    quantization = t.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.float32
    )
    model = load_model(str(llava_folder), quantization_config=quantization)
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantised == {name for name in linear if name.startswith("model.language_model.")}
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.dtype == torch.float32


def test_a_missing_torchvision_leaves_the_tokenizer(tmp_path, llava_folder, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise ImportError("\nAutoVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(t.AutoProcessor, "from_pretrained", fails)
    loaded = load_processing_class(str(llava_folder))
    assert isinstance(loaded, t.PreTrainedTokenizerBase)
    assert "trained on text alone" in caplog.text and "Torchvision" in caplog.text


# ---------------------------------------------------------------- image sizes


def tokens_of(processor, name: str) -> int:
    text = FAMILIES[name].placeholder
    return len(processor(text=[text], images=[[drawing(96, 40, 0)]])["input_ids"][0])


def fresh(name: str) -> t.ProcessorMixin:
    return FAMILIES[name].processor(tokenizer())


def test_max_pixels_bounds_the_tokens_of_an_image():
    processor = fresh("qwen2_5_vl")
    before = tokens_of(processor, "qwen2_5_vl")
    set_image_sizes(processor, ImageSizes(max_pixels=16 * 16))
    assert tokens_of(processor, "qwen2_5_vl") <= 2 + 4 < before
    set_image_sizes(processor, ImageSizes(min_pixels=64 * 64, max_pixels=80 * 80))
    assert tokens_of(processor, "qwen2_5_vl") >= 2 + 64
    assert processor.image_processor.to_dict()["size"] == {"shortest_edge": 64 * 64, "longest_edge": 80 * 80}


@pytest.mark.parametrize(
    "name, options",
    [
        ("idefics3", {"do_image_splitting": False}),
        ("internvl", {"max_patches": 1, "crop_to_patches": False}),
        ("llava_next", {"image_grid_pinpoints": [[16, 16]]}),
        ("mistral3", {"size": {"longest_edge": 16}}),
    ],
)
def test_each_processors_own_options(name, options):
    processor = fresh(name)
    before = tokens_of(processor, name)
    set_image_sizes(processor, ImageSizes(processor_kwargs=options))
    assert tokens_of(processor, name) < before


def test_pan_and_scan_adds_tokens(tmp_path):
    processor = fresh("gemma3")
    before = tokens_of(processor, "gemma3")
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 4,
             "pan_and_scan_min_ratio_to_activate": 1.1}  # fmt: skip
    set_image_sizes(processor, ImageSizes(processor_kwargs=crops))
    assert tokens_of(processor, "gemma3") > before
    processor.save_pretrained(tmp_path)
    loaded = t.Gemma3Processor.from_pretrained(tmp_path)
    assert loaded.image_processor.do_pan_and_scan


def test_unknown_image_options_are_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"max_pixels: CLIPImageProcessorPil has no such option\. It knows crop_size"):
        set_image_sizes(fresh("llava"), ImageSizes(max_pixels=100))
    with pytest.raises(UserError, match="min_pixels: the model has no image processor"):
        set_image_sizes(tiny_processor("llava").tokenizer, ImageSizes(min_pixels=100))
