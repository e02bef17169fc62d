"""Reads a recipe's YAML file as values with line numbers, so that every error can point at its line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orpo_dist.errors import UserError


@dataclass(frozen=True)
class RecipeFile:
    """Top-level keys of one recipe.

    Attributes:
        values: key to value, as YAML reads them (`1e-5` is still a string here: YAML 1.1 requires `1.0e-5`).
        lines: key to line number, from 1.
        environment: the `env:` section, variables to set before anything is imported that reads them.
    """

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]
    environment: dict[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        return f"{self.path}, line {self.lines[key]}"


def read_recipe_file(path: str | Path) -> RecipeFile:
    """Read a recipe with a safe YAML loader.

    Raises:
        UserError: the file does not exist, is not valid YAML (with the line), is not a mapping, or sets a key twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"recipe file {path} does not exist (current folder: {Path.cwd()}).") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; give a recipe file, such as {path / 'recipe.yaml'}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8.") from error
    loader = yaml.SafeLoader(text)
    try:
        return _from_node(path, loader, loader.get_single_node())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}.") from error
    finally:
        loader.dispose()


def _from_node(path: Path, loader: yaml.SafeLoader, node: yaml.Node | None) -> RecipeFile:
    if node is None:
        return RecipeFile(path, {}, {})
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: a recipe must be a mapping of `field: value` lines, not a {_kind(node)}.")
    written = [key.value for key, _ in node.value]
    for key, _ in node.value:
        if written.count(key.value) > 1:
            twice = [str(other.start_mark.line + 1) for other, _ in node.value if other.value == key.value]
            raise UserError(f"{path}: `{key.value}` is set twice, on lines {' and '.join(twice)}. Keep one of them.")
    loader.flatten_mapping(node)  # `<<: *anchor`
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        values[key] = loader.construct_object(value_node, deep=True)
        lines[key] = key_node.start_mark.line + 1
    environment = values.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise UserError(f"{path}, line {lines['env']}: `env` must be a mapping of variable to value.")
    return RecipeFile(path, values, lines, {str(name): str(value) for name, value in environment.items()})


def _kind(node: yaml.Node) -> str:
    return "list" if isinstance(node, yaml.SequenceNode) else "single value"
