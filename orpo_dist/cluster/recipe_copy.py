"""The copy of a recipe that a job reads: without secrets, which reach the job in its environment."""

import json
from collections.abc import Sequence
from typing import Any

import yaml

from orpo_dist.options.secrets import private_environment, public_environment, secrets_of, without_secrets
from orpo_dist.recipe.file import read_recipe_file


def public_copy(recipe: str, private: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The text of the copy, and the variables that bring the recipe's secrets and `private` flags to the job.

    A recipe without secrets is copied as it is, with its comments. Flags override a recipe, so they come last.
    """
    file = read_recipe_file(recipe)
    hidden, public = secrets_of(file.values), public_environment(file.environment)
    words = [word for name, value in hidden.items() for word in (f"--{name}", _flag(value))]
    variables = {name: value for name, value in file.environment.items() if name not in public}
    environment = variables | private_environment([*words, *private])
    if not hidden and not variables:
        return file.path.read_text("utf-8"), environment
    values = without_secrets(file.values)
    text = yaml.safe_dump({"env": public, **values} if public else values, sort_keys=False, allow_unicode=True)
    return text, environment


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
