"""Rows with images through every interface: a recipe, AutoTrain's class and flags, `data check` and `data stats`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from orpo_dist.autotrain import local as autotrain_launch
from orpo_dist.autotrain.project import AutoTrainProject, LLMTrainingParams
from orpo_dist.cli import main
from tests.model.tiny_vlms import drawing
from tests.vlm.rows import save_vlm, swift_and_trl_rows, write_rows

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """pairs.jsonl with 9 rows: three have one image, three have two, three have none; paths from its folder."""
    folder = tmp_path_factory.mktemp("data")
    return write_rows(folder / "pairs.jsonl", swift_and_trl_rows(folder, 9))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(autotrain_launch, "gpu_count", lambda: 0)


def check_adapter(run: Path, model: Path) -> None:
    """The adapter changes the base in plain transformers and peft, and the saved processor feeds it an image."""
    base = AutoModelForImageTextToText.from_pretrained(model)
    processor = AutoProcessor.from_pretrained(run)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[drawing(32, 24, 0)]], return_tensors="pt")
    with torch.no_grad():
        before = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, run)
        after = adapted(**inputs).logits
        reply = adapted.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    assert reply.shape[1] > inputs["input_ids"].shape[1]


def test_a_recipe(model, data, tmp_path):
    recipe = tmp_path / "vlm.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": str(model),
                "dataset_name": str(data),
                "test_split_size": 2,
                "output_dir": str(tmp_path / "run"),
                "use_peft": True,
                "lora_r": 4,
                "learning_rate": 1e-2,
                "num_train_epochs": 3,
                "per_device_train_batch_size": 3,
                "save_strategy": "no",
                "use_cpu": True,
                "dataloader_num_workers": 1,
            }
        )
    )
    assert main(["train", str(recipe)]) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "run_summary.json").read_text())
    assert (summary["pairs"], summary["dropped"], summary["eval_pairs"]) == (7, 0, 2)
    assert summary["eval_after"]["nll_loss"] < summary["eval_before"]["nll_loss"]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["max_length"] is None
    check_adapter(run, model)


def params(model: Path, data: Path, run: Path, **values) -> LLMTrainingParams:
    return LLMTrainingParams(
        model=str(model),
        data_path=str(data),
        project_name=str(run),
        trainer="orpo",
        prompt_text_column="prompt",
        text_column="chosen",
        rejected_text_column="rejected",
        image_column="images",
        peft=True,
        lora_r=4,
        merge_adapter=False,
        epochs=1,
        log="none",
        **values,
    )


def test_autotrain_project(model, data, tmp_path):
    """As in AutoTrain's documentation. block_size stays at 1024, which does not hold for images."""
    run = AutoTrainProject(params=params(model, data, tmp_path / "run", lr=1e-2), backend="local").create()
    assert json.loads((run / "run_summary.json").read_text())["pairs"] == 9
    assert yaml.safe_load((run / "recipe.yaml").read_text())["max_length"] is None
    check_adapter(run, model)


def test_autotrain_flags(model, data, tmp_path, capsys):
    """Strings under other names become turns, with the image in front of the question."""
    rows = [
        {"picture": row["images"], "question": f"Which colour, {i}?", "good": "It is red.", "bad": "No."}
        for i, row in enumerate(map(json.loads, data.read_text().splitlines()))
    ]
    path = write_rows(data.with_name("strings.jsonl"), rows)
    columns = "--prompt-text-column question --text-column good --rejected-text-column bad --image-column picture"
    command = ["llm", "--train", "--trainer", "orpo", "--model", str(model), "--data-path", str(path)]
    command += ["--project-name", str(tmp_path / "run"), *columns.split(), *["--peft", "--log", "none", "--lr", "1e-2"]]
    assert main([*command, "--no-merge-adapter"]) == 0
    output = capsys.readouterr()
    assert "become a user and an assistant turn" in output.err
    assert "9 rows, 9 pairs kept" in output.out and "images in `picture`" in output.out
    check_adapter(tmp_path / "run", model)


def test_images_that_do_not_fit_are_dropped_when_a_bound_is_asked_for(model, data, tmp_path, capsys):
    arguments = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(tmp_path / "run")]
    assert main(["train", *arguments, "--use_cpu", "--max_length", "52"]) == 2
    error = capsys.readouterr().err
    assert "prompt too long" in error and "(32 of images)" in error
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "dropped_rows.jsonl").read_text().splitlines()]
    assert len(kinds) == 3 and set(kinds) == {"prompt too long"}


def test_a_text_model_is_refused_before_it_is_loaded(data, tmp_path, chat_tokenizer, tiny_llama, capsys):
    chat_tokenizer.save_pretrained(tmp_path / "text")
    tiny_llama(len(chat_tokenizer)).config.save_pretrained(tmp_path / "text")  # no weights: it must not come so far
    arguments = ["--model_name_or_path", str(tmp_path / "text"), "--dataset_name", str(data)]
    arguments += ["--output_dir", str(tmp_path / "run"), "--use_cpu"]
    assert main(["train", *arguments]) == 2
    assert "image_column=images), and the model reads text only" in capsys.readouterr().err
    assert main(["train", *arguments, "--image_column", "pictures"]) == 2
    assert "image_column=pictures: no such column" in capsys.readouterr().err
    assert main(["data", "check", str(data), "--model", str(tmp_path / "text"), "--image_column", ""]) == 0


def test_check_and_stats(model, data, capsys):
    assert main(["data", "check", str(data)]) == 0
    output = capsys.readouterr().out
    assert "images in `images`" in output and "9 images in 9 pairs: 3 with 0, 3 with 1, 3 with 2" in output
    assert main(["data", "stats", str(data), "--model", str(model)]) == 0
    output = capsys.readouterr().out
    assert "9 pairs, lengths in tokens" in output and "9 images in 9 pairs" in output
    lines = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line[:1].isalpha()}
    assert lines["tokens"] == ["16"] * 8  # LLaVA's 16 x 16 pixels in patches of 4
    assert lines["width"][-1] == "48" and lines["height"][-1] == "19"
    (data.parent / "images" / "0-0.png").rename(data.parent / "images" / "gone.png")
    try:
        assert main(["data", "check", str(data), "--max_bad_rows", "1"]) == 0
        assert "1 x missing image" in capsys.readouterr().out
    finally:
        (data.parent / "images" / "gone.png").rename(data.parent / "images" / "0-0.png")


@pytest.mark.topology
def test_two_processes_equal_one(model, data, tmp_path):
    """With the projector trained, so that a rank whose micro-batch has no image must still take part."""
    weights = []
    for name, launcher in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
    ):
        recipe = {
            "model_name_or_path": str(model),
            "dataset_name": str(data),
            "output_dir": str(tmp_path / name),
            "optim": "sgd",
            "learning_rate": 0.1,
            "per_device_train_batch_size": 2 if name == "one" else 1,
            "gradient_accumulation_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "train_projector": True,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        command = [*launcher, "-m", "orpo_dist.cli", "train", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    start = load_file(model / "model.safetensors")
    for name, one in weights[0].items():
        largest = (one - start[name]).abs().max()
        assert (one - weights[1][name]).abs().max() <= 1e-4 * largest + 1e-7, name
    assert any((weights[0][name] != start[name]).any() for name in start if "projector" in name)
