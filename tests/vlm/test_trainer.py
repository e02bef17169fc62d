"""ORPOTrainer with images: every way to lay pairs out and to cut the global batch trains to the same weights."""

import logging

import pytest
import torch
from peft import LoraConfig

from orpo_dist import ORPOConfig, ORPOTrainer
from orpo_dist.errors import UserError
from orpo_dist.model.loading import vision
from orpo_dist.model.packed import verify_images
from orpo_dist.packing.images import ImageCollator
from orpo_dist.packing.sampler import GlobalBatchSampler
from tests.model.tiny_vlms import drawing, image_row, image_rows, tiny_processor, tiny_vlm


def config(folder, **options) -> ORPOConfig:
    settings = dict(
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_length=None,
    )
    return ORPOConfig(str(folder), **settings | options)


def trained(folder, name: str, rows=None, *, peft_config=None, **options) -> ORPOTrainer:
    trainer = ORPOTrainer(
        tiny_vlm(name),
        config(folder, **options),
        train_dataset=rows or image_rows(name) * 2,
        processing_class=tiny_processor(name),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def weights(trainer: ORPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_weights(ours: ORPOTrainer, theirs: ORPOTrainer) -> None:
    expected, start = weights(theirs), dict(tiny_vlm(theirs.model.config.model_type).named_parameters())
    assert weights(ours).keys() == expected.keys()
    moved = max((weight - start[name]).abs().max().item() for name, weight in expected.items())
    for name, weight in expected.items():
        difference = (weights(ours)[name] - weight).abs().max().item()
        assert difference <= 1e-4 * moved, (name, difference, moved)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3"])
def test_layouts_and_cuts_train_to_the_same_weights(tmp_path, name):
    packed = trained(tmp_path, name)
    assert packed.layout.is_packed and packed.layout.prefix_sharing
    padded = trained(tmp_path, name, padding_free=False)
    assert not padded.layout.is_packed
    assert_same_weights(padded, packed)
    cut = trained(tmp_path, name, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_weights(cut, packed)
    workers = trained(tmp_path, name, dataloader_num_workers=2)
    assert_same_weights(workers, packed)


def test_tower_and_projector_train_when_asked_for(tmp_path):
    frozen = trained(tmp_path, "llava")
    assert not any("vision_tower" in name or "projector" in name for name in weights(frozen))
    both = trained(tmp_path, "llava", train_vision_tower=True, train_projector=True)
    before = dict(tiny_vlm("llava").named_parameters())
    for part in ("vision_tower", "multi_modal_projector"):
        names = [name for name in weights(both) if part in name and name.endswith("weight")]
        assert names and any((weights(both)[name] - before[name]).abs().max() > 1e-6 for name in names)


def test_an_adapter_stays_in_the_language_model(tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear")
    trainer = trained(tmp_path, "llava", peft_config=lora)
    assert weights(trainer) and all("language_model" in name for name in weights(trainer))
    with_tower = trained(tmp_path, "llava", peft_config=lora, train_vision_tower=True)
    assert any("vision_tower" in name for name in weights(with_tower))


def test_a_family_that_packs_wrongly_falls_back_with_a_reason(tmp_path, monkeypatch, caplog):
    expected = trained(tmp_path, "gemma3", padding_free=False)
    monkeypatch.setattr(vision, "_BIDIRECTIONAL", {})
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, "gemma3")
    assert not trainer.layout.is_packed
    assert "Padded layout: with images its hidden states differ by" in caplog.text
    assert_same_weights(trainer, expected)


def test_a_model_whose_features_cannot_be_shared_gets_the_pixels_twice(tmp_path, monkeypatch, caplog):
    expected = trained(tmp_path, "llava", padding_free=False)

    def scrambled(features):
        return [*features, *(feature.flip(-1) for feature in features)]

    monkeypatch.setattr(vision, "_repeated", scrambled)
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, "llava", padding_free=False)
    assert trainer.layout.collator.chosen.pixels_twice
    assert "The vision tower runs twice per pair: with images its hidden states differ" in caplog.text
    assert_same_weights(trainer, expected)


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_model_whose_own_forward_fails_stops_before_training(tmp_path, monkeypatch, padding_free):
    own = verify_images.run

    def fails(model, base, batch):
        if "orpo_layout" not in batch:
            raise IndexError("index 3 is out of bounds")
        own(model, base, batch)

    monkeypatch.setattr(verify_images, "run", fails)
    with pytest.raises(UserError, match=r"LlavaForConditionalGeneration cannot compute pairs .*IndexError: index 3"):
        trained(tmp_path, "llava", padding_free=padding_free)


def test_images_by_cross_attention_are_refused(tmp_path):
    model = tiny_vlm("llava")
    model.config.text_config.cross_attention_layers = [0]  # as in Llama 3.2 Vision's config
    with pytest.raises(UserError, match="reads images by cross-attention, which is not supported"):
        ORPOTrainer(
            model,
            config(tmp_path),
            train_dataset=image_rows("llava"),
            processing_class=tiny_processor("llava"),
        )


def test_a_processor_that_refuses_drawings_is_checked_with_images_of_the_data():
    class Refusing:
        image_processor = tiny_processor("llava").image_processor

        def __call__(self, **_):
            raise ValueError("the image is too small")

    row = image_rows("llava")[0]
    own = verify_images.drawn_row(row, Refusing())
    assert own == {name: row[name] for name in ("prompt_ids", "images", "prompt_text", "prompt_places") if name in row}


def test_images_need_a_processor_that_makes_the_rows_tokens(tmp_path):
    rows = image_rows("llava")
    with pytest.raises(UserError, match="the processing class is a tokenizer"):
        ORPOTrainer(
            tiny_vlm("llava"),
            config(tmp_path),
            train_dataset=rows,
            processing_class=tiny_processor("llava").tokenizer,
        )
    rows[1]["prompt_ids"] = rows[1]["prompt_ids"][:-1]
    with pytest.raises(UserError, match="Pair 1: the processor makes 41 tokens of its prompt and images"):
        trained(tmp_path, "llava", rows)


def test_an_image_that_is_gone_is_named(tmp_path):
    rows = image_rows("llava")
    rows[3]["images"] = [{"bytes": None, "path": str(tmp_path / "gone.png")}]
    with pytest.raises(UserError, match=r"Pair 3: missing image: .*gone\.png"):
        trained(tmp_path, "llava", rows)


def test_prefix_sharing_off_is_answered(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, "llava", prefix_sharing=False)
    assert trainer.layout.prefix_sharing and "prefix_sharing=false has no effect on pairs with images" in caplog.text


def test_bins_count_the_vision_tower(tmp_path):
    """Two pairs of equal length, one of them images: with its tower's cost it fills a bin alone."""
    picture = image_row("qwen2_5_vl", 0, [drawing(64, 64, 0)], "two", "ten", "six")
    tokens = len(picture["prompt_ids"])
    words = {**picture, "images": [], "prompt_ids": [10] * tokens, "prompt_text": ""}
    rows = [picture, words, words, words]
    trainer = ORPOTrainer(
        tiny_vlm("qwen2_5_vl"), config(tmp_path), train_dataset=rows, processing_class=tiny_processor("qwen2_5_vl")
    )
    assert trainer.layout.vision_cost_per_token > 0.2
    sampler = trainer.get_train_dataloader().batch_sampler
    assert isinstance(sampler, GlobalBatchSampler)
    extra = sampler.costs[0] - sampler.costs[1]
    image_tokens = picture["prompt_ids"].count(trainer.model.config.image_token_id)
    assert extra == pytest.approx(image_tokens * trainer.layout.vision_cost_per_token)
    assert sampler.costs[1] == sampler.costs[2]


def test_rows_without_images_need_no_image_collator(tmp_path):
    rows = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in image_rows("llava")]
    trainer = trained(tmp_path, "llava", [row for row in rows if len(row["prompt_ids"]) < 15])
    assert trainer.layout.is_packed and not isinstance(trainer.layout.collator.chosen, ImageCollator)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_sampled_replies_see_the_image(tmp_path, name):
    rows = image_rows(name)
    trainer = ORPOTrainer(
        tiny_vlm(name),
        config(tmp_path, generate_during_eval=True, max_completion_length=5),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_processor(name),
    )
    seen = []
    generate = trainer.model.generate
    trainer.model.generate = lambda **inputs: seen.append(inputs) or generate(**inputs)
    trainer.evaluate()
    trainer.train()
    assert sum("pixel_values" in inputs for inputs in seen) == 3 and len(seen) == 4
    samples = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 4
