"""When a run counts as finished, from the files in its folder."""

import json
import os
import time
from dataclasses import fields

import pytest
import torch
from safetensors.torch import save_file

from orpo_dist.recipe.recipe import Recipe
from orpo_dist.run.finished import finished_run
from orpo_dist.run.summary import RunSummary


@pytest.fixture
def made(tmp_path):
    """`made(**changes)`: a recipe with local rows and model; its folder holds a finished run of it."""
    model, rows, folder = tmp_path / "model", tmp_path / "rows", tmp_path / "run"
    for path in (model / "config.json", rows / "train.jsonl", folder / "model.safetensors"):
        path.parent.mkdir()
        path.write_text("{}")
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")

    def recipe(**changes):
        asked = {"resume_from_checkpoint": "auto", "max_steps": 4, "use_cpu": True}
        places = {"model_name_or_path": str(model), "dataset_name": str(rows), "output_dir": str(folder)}
        return Recipe.from_mapping({**places, **asked, **changes})

    recipe().save(folder / "recipe.yaml")
    content = dict.fromkeys((field.name for field in fields(RunSummary)), None) | {"steps": 4}
    (folder / "run_summary.json").write_text(json.dumps(content))
    return recipe


def test_finished(made, tmp_path):
    folder = tmp_path / "run"
    for asked in ("auto", "true", True):
        summary = finished_run(made(resume_from_checkpoint=asked), folder)
        assert summary is not None and summary.steps == 4
    assert finished_run(made(resume_from_checkpoint="false"), folder) is None
    assert finished_run(made(max_steps=5), folder) is None
    assert finished_run(made(merge_adapter=True, use_peft=True), folder) is None


@pytest.mark.parametrize(
    "missing", ["run_summary.json", "recipe.yaml", "model.safetensors"], ids=["summary", "recipe", "model"]
)
@pytest.mark.parametrize("broken", [None, "", "{", "null", "[]", '{"steps": 4}'])
def test_a_file_that_is_missing_or_broken(made, tmp_path, missing, broken):
    path = tmp_path / "run" / missing
    path.unlink()
    if broken is not None and missing != "model.safetensors":
        path.write_text(broken)
    assert finished_run(made(), tmp_path / "run") is None


@pytest.mark.parametrize("source", ["rows/train.jsonl", "model/config.json"])
def test_a_source_that_has_changed_since(made, tmp_path, source):
    later = time.time() + 60
    os.utime(tmp_path / source, (later, later))
    assert finished_run(made(), tmp_path / "run") is None


def test_a_later_checkpoint(made, tmp_path):
    (tmp_path / "run" / "checkpoint-5").mkdir()
    assert finished_run(made(), tmp_path / "run") is None
