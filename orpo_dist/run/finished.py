"""Whether a run that is started again has finished already, with the same recipe."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from orpo_dist.recipe.recipe import Recipe
from orpo_dist.run.checkpoint import checkpoint_folders, step_of
from orpo_dist.run.summary import SUMMARY_NAME, RunSummary

RECIPE_NAME = "recipe.yaml"
_MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
# They say how to start, not what to train. max_length is resolved for the model where the recipe leaves it open.
_MAY_DIFFER = {"resume_from_checkpoint", "allow_changed", "strict_versions", "max_runtime"}


def finished_run(recipe: Recipe, folder: Path) -> RunSummary | None:
    """The summary of the finished run in `folder`, None if there is something left to do.

    That is: a summary whose step is that of the newest checkpoint, the model's files at full length, the same recipe,
    and no local file of data or model that is newer than the summary.

    Raises:
        UserError: the folder of rows has no such split.
    """
    if str(recipe.training.resume_from_checkpoint or "false").lower() not in ("auto", "true"):
        return None
    summary = _summary(folder / SUMMARY_NAME)
    if summary is None or not _same_recipe(recipe, folder / RECIPE_NAME):
        return None
    checkpoints = checkpoint_folders(folder)
    if checkpoints and step_of(checkpoints[-1]) > summary.steps:
        return None
    if not _holds_weights(folder) or (summary.merged_model is not None and not _holds_weights(folder / "merged")):
        return None
    written = (folder / SUMMARY_NAME).stat().st_mtime
    return summary if all(path.stat().st_mtime <= written for path in _sources(recipe)) else None


def _holds_weights(folder: Path) -> bool:
    """Whether the weight files are there and none is cut short. Their headers say how long they are."""
    found = [folder / name for name in _MODEL_FILES if (folder / name).is_file()]
    try:
        for path in found:
            parts = [path]
            if path.suffix == ".json":
                parts = [folder / name for name in set(json.loads(path.read_bytes())["weight_map"].values())]
            for part in parts:
                with safe_open(part, "pt"):
                    pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError):
        return False
    return bool(found)


def _sources(recipe: Recipe) -> Iterator[Path]:
    """The local files of rows and models."""
    data = recipe.data
    for model in (recipe.model.model_name_or_path, recipe.model.adapter_name_or_path):
        if model is not None and Path(model).is_dir():
            yield from (path for path in Path(model).iterdir() if path.is_file())
    rows = Path(str(data.dataset_name))
    if rows.is_file():
        yield rows
    elif rows.is_dir():
        from orpo_dist.data.folders import split_files

        for split in (data.dataset_train_split, data.dataset_test_split):
            if split is not None:
                yield from split_files(rows, split.partition("[")[0], data.dataset_config).files


def _summary(path: Path) -> RunSummary | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return RunSummary(**{field.name: content[field.name] for field in fields(RunSummary)})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _same_recipe(recipe: Recipe, path: Path) -> bool:
    try:
        then: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    now = yaml.safe_load(recipe.text())
    if not isinstance(then, dict):
        return False
    ignored = _MAY_DIFFER | ({"max_length"} if "max_length" not in now else set())
    return {name: value for name, value in then.items() if name not in ignored} == {
        name: value for name, value in now.items() if name not in ignored
    }
