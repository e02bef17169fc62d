"""The public interface: what `orpo_dist` exports, lazily."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import orpo_dist

HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "accelerate", "numpy")


@pytest.mark.parametrize("name", orpo_dist.__all__)
def test_every_name_is_there(name):
    value = getattr(orpo_dist, name)
    assert name == "__version__" or value.__name__ == name
    assert name in dir(orpo_dist)


def test_type_checkers_see_the_same_names_from_the_same_modules():
    tree = ast.parse(Path(orpo_dist.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == orpo_dist._MODULE_OF
    assert seen.keys() | {"__version__"} == set(orpo_dist.__all__)


def test_a_star_import_and_an_unknown_name():
    names: dict[str, object] = {}
    exec("from orpo_dist import *", names)
    assert set(orpo_dist.__all__) <= names.keys()
    with pytest.raises(AttributeError, match="no attribute 'ORPOTrianer'"):
        _ = orpo_dist.ORPOTrianer
    with pytest.raises(ImportError):
        exec("from orpo_dist import ORPOTrianer")


@pytest.mark.parametrize(
    "statement",
    ["import orpo_dist", "from orpo_dist import UserError", "from orpo_dist.autotrain import LLMTrainingParams"],
)
def test_the_import_is_light(statement):
    program = f"import sys; {statement}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_package_says_that_it_has_types():
    assert Path(orpo_dist.__file__).with_name("py.typed").is_file()
