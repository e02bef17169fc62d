"""Vision-language models on two processes, of which one has no image in most micro-steps, train like one process."""

import pytest
import torch
import transformers as t
from peft import PeftModel

from tests.launching.launch import run_worker
from tests.model.tiny_vlms import TOWER, _ids, _llava_processor, _text, drawing, tiny_vlm, tokenizer
from tests.topologies.runs import SKIP_IN_LOG

STEPS = 6
CONFIG = dict(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    max_steps=STEPS,
    learning_rate=0.02,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=1.0,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    gradient_checkpointing=False,
    max_length=None,
    eval_strategy="steps",
    eval_steps=STEPS,
    per_device_eval_batch_size=2,
)
SPLIT = {**CONFIG, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
ALL = {"train_vision_tower": True, "train_projector": True}
LORA = dict(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    for family in ("qwen2_5_vl", "llava"):
        tiny_vlm(family).save_pretrained(folder / family)
    return folder


def run(folder, name, family, config, launcher=None, **more):
    settings = {"family": family, "model": str(folder / family), "config": config, **more}
    return run_worker(settings, folder / name, launcher, worker="vlm_worker")


@pytest.fixture(scope="module")
def references(folder):
    """One process, by name; each is run when it is first asked for."""
    known: dict = {}

    def reference(name, family, config, **more):
        if name not in known:
            known[name] = run(folder, f"one_{name}", family, config, **more)
        return known[name]

    return reference


def weights(outcome):
    """Of the adapter, or of the model as plain transformers loads it: the names in Qwen2.5-VL's file differ under
    ZeRO-3, and transformers knows both."""
    if (outcome.saved / "adapter_config.json").is_file():
        return outcome.weights
    return t.AutoModelForImageTextToText.from_pretrained(outcome.saved).state_dict()


def assert_same(outcome, reference, weight_tolerance=1e-5):
    assert outcome.facts["world_size"] == 2 and outcome.facts["packed"]
    assert len(outcome.log) == len(reference.log)
    for ours, theirs in zip(outcome.log, reference.log, strict=True):
        for key in theirs.keys() - SKIP_IN_LOG:
            if "runtime" in key or "per_second" in key or "preparation_time" in key:
                continue
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=2e-6), (key, theirs["step"])
    ours, theirs = (weights(result) for result in (outcome, reference))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        difference = (ours[name] - weight).abs().max()
        assert difference <= weight_tolerance * weight.abs().max() + 1e-7, (name, difference)


@pytest.mark.topology
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("launcher", ["zero3", "fsdp2"])
def test_partitioned_weights_with_a_rank_without_images(folder, references, family, launcher):
    reference = references(family, family, CONFIG)
    outcome = run(folder, f"{family}_{launcher}", family, SPLIT, launcher)
    assert outcome.facts["has_filler"]
    assert outcome.facts["partitioned_parameters"] + outcome.facts["sharded_parameters"] > 0
    assert_same(outcome, reference)


@pytest.mark.topology
@pytest.mark.parametrize("launcher", ["torchrun", "zero3"])
def test_trained_tower_with_a_rank_without_images(folder, references, launcher):
    reference = references("all", "qwen2_5_vl", {**CONFIG, **ALL})
    outcome = run(folder, f"all_{launcher}", "qwen2_5_vl", {**SPLIT, **ALL}, launcher)
    assert outcome.facts["has_filler"]
    assert_same(outcome, reference)


@pytest.mark.topology
def test_ddp_with_a_frozen_tower_needs_no_filler(folder, references):
    reference = references("llava", "llava", CONFIG)
    outcome = run(folder, "ddp", "llava", SPLIT, "torchrun")
    assert not outcome.facts["has_filler"]
    assert_same(outcome, reference)


@pytest.fixture(scope="module")
def wide(folder):
    """A LLaVA wide enough for blocks of 64 weights, which bitsandbytes quantises."""
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
    model.save_pretrained(folder / "wide")
    processor.save_pretrained(folder / "wide")
    return folder / "wide"


@pytest.mark.topology
def test_qlora_under_zero3_reloads_in_plain_transformers_and_generates(folder, references, wide):
    settings = {"model": str(wide), "lora": LORA, "load_in_4bit": True}
    reference = references("qlora", "llava", CONFIG, **settings)
    outcome = run(folder, "qlora", "llava", SPLIT, "zero3_qlora", **settings)
    assert outcome.facts["quantized_layers"] > 0 and outcome.facts["quantized_in_vision"] == 0
    assert outcome.facts["partitioned_parameters"] > 0
    assert_same(outcome, reference, weight_tolerance=1e-4)

    base = t.AutoModelForImageTextToText.from_pretrained(wide)
    processor = t.AutoProcessor.from_pretrained(outcome.saved)
    inputs = processor(text=["<image>What is this?"], images=[[drawing(32, 24, 0)]], return_tensors="pt")
    with torch.no_grad():
        before = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, outcome.saved)
        after = adapted(**inputs).logits
        other = adapted(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
        reply = adapted.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-3, "the adapter changes nothing"
    assert (after - other).abs().max() > 1e-3, "the image changes nothing"
    assert reply.shape[1] > inputs["input_ids"].shape[1]
