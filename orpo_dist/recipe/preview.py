"""Reads single values of a recipe and its flags, without importing the libraries that check all of them.

    python -m orpo_dist.recipe.preview RECIPE.yaml [--field value ...]     prints the run's folder

Templates and launchers need the run's folder or the kind of adapter before heavy imports.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orpo_dist.errors import BAD_INPUT, FINISHED, UserError
from orpo_dist.recipe.file import read_recipe_file


@dataclass(frozen=True)
class RecipePreview:
    """Values of a recipe file, overridden by the flags after it."""

    path: Path
    values: dict[str, Any]
    environment: dict[str, str]

    @property
    def run_folder(self) -> Path:
        """The run's folder, as an absolute path."""
        return Path(os.path.abspath(self.values.get("output_dir") or f"runs/{self.path.stem}"))

    @property
    def trains_adapter(self) -> bool:
        return bool(self.values.get("use_peft")) or self.values.get("adapter_name_or_path") is not None

    @property
    def quantised(self) -> bool:
        return bool(self.values.get("load_in_4bit") or self.values.get("load_in_8bit"))


def check_row_groups(view: RecipePreview, processes_per_node: int) -> None:
    """Raises UserError if ranks that share a row would lie on several nodes: they exchange heads in each layer."""
    size = view.values.get("sequence_parallel_size")
    if size is not None and str(size).isdigit() and int(size) and processes_per_node % int(size):
        raise UserError(
            f"sequence_parallel_size={size} does not divide the {processes_per_node} processes of a node: the ranks "
            "that share a row must be on one node."
        )


def preview(recipe: str | Path, flags: Sequence[str] = ()) -> RecipePreview:
    """Read a recipe and its flags (`--name value`, `--name=value`, `--switch`, `--no_switch`).

    Raises:
        UserError: the file does not exist or is not valid YAML.
    """
    file = read_recipe_file(recipe)
    return RecipePreview(file.path, file.values | _values_of(flags), file.environment)


def _values_of(flags: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for position, flag in enumerate(flags):
        if not flag.startswith("--"):
            continue
        name, equals, value = flag[2:].partition("=")
        following = flags[position + 1] if position + 1 < len(flags) else "--"
        name, switch = name.replace("-", "_"), not equals and following.startswith("--")
        if switch and name.startswith("no_"):
            values[name.removeprefix("no_")] = False
        else:
            values[name] = True if switch else yaml.safe_load(value if equals else following)
    return values


def without_gpu(values: dict[str, object]) -> list[str]:
    """Flags that allow reading a recipe for GPUs on a node without one."""
    flags = ["--use_cpu", "true"]
    for name in ("fp16", "tf32"):
        if values.get(name):
            flags += [f"--{name}", "false"]
    return flags


def main(argv: Sequence[str]) -> int:
    """Print the run's folder. Returns 0, or 2 after an error message."""
    if not argv:
        print("usage: python -m orpo_dist.recipe.preview RECIPE.yaml [--field value ...]", file=sys.stderr)
        return BAD_INPUT
    try:
        print(preview(argv[0], argv[1:]).run_folder)
    except UserError as error:
        print(f"orpo-dist: error: {error}", file=sys.stderr)
        return BAD_INPUT
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
