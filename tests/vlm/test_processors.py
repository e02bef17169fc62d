"""Families whose processors need torchvision, end to end: trained from rows, saved, reloaded, merged, and used with
plain transformers."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from orpo_dist.cli import main
from tests.model.tiny_vlms import drawing, tiny_processor
from tests.vlm.rows import save_vlm, swift_and_trl_rows, write_rows

SIZES = {
    "qwen2_5_vl": ["--max_pixels", "512"],
    "internvl": ["--processor_kwargs", '{"max_patches": 2}'],
    "smolvlm": ["--processor_kwargs", '{"do_image_splitting": false}'],
    "llava_onevision": [],
    "mistral3": ["--processor_kwargs", '{"size": {"longest_edge": 24}}'],  # Pixtral's processor
}


@pytest.mark.parametrize("family", SIZES)
def test_train_reload_merge_and_plain_transformers(family, tmp_path):
    model, run = save_vlm(tmp_path / "model", family), tmp_path / "run"
    data = write_rows(tmp_path / "pairs.jsonl", swift_and_trl_rows(tmp_path, 6))
    recipe = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(run)]
    recipe += ["--use_peft", "--lora_r", "4", "--learning_rate", "0.05", "--max_steps", "2", "--use_cpu"]
    recipe += ["--per_device_train_batch_size", "3", "--save_strategy", "no", *SIZES[family]]
    assert main(["train", *recipe]) == 0
    assert main(["merge", str(run)]) == 0

    assert type(AutoProcessor.from_pretrained(run)) is type(tiny_processor(family))
    inputs = {"run": question(run), "merged": question(run / "merged")}
    for name, tensor in inputs["run"].items():
        assert torch.equal(tensor, inputs["merged"][name]), name
    fewer = inputs["run"]["input_ids"].numel() < question(model)["input_ids"].numel()
    assert fewer == bool(SIZES[family])

    base = AutoModelForImageTextToText.from_pretrained(model)
    merged = AutoModelForImageTextToText.from_pretrained(run / "merged")
    with torch.no_grad():
        before = base(**inputs["run"]).logits
        adapted = PeftModel.from_pretrained(base, run)(**inputs["run"]).logits
        after = merged(**inputs["merged"]).logits
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(after, adapted, rtol=1e-4, atol=1e-4)


def question(folder: Path) -> dict[str, torch.Tensor]:
    """A drawing and a question as the processor of `folder` gives them to a model."""
    processor = AutoProcessor.from_pretrained(folder)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    return dict(processor(text=[text], images=[[drawing(90, 30, 0)]], return_tensors="pt"))
