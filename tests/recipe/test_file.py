"""A recipe's values with the lines they stand on."""

import pytest

from orpo_dist.errors import UserError
from orpo_dist.recipe.file import read_recipe_file


@pytest.fixture
def read(tmp_path):
    def make(text):
        (tmp_path / "recipe.yaml").write_text(text)
        return read_recipe_file(tmp_path / "recipe.yaml")

    return make


def test_values_and_lines(read, tmp_path):
    file = read("# a comment\nbeta: 0.2\n\nlora_target_modules:\n  - q_proj\nlearning_rate: 1e-5\n")
    assert file.values == {"beta": 0.2, "lora_target_modules": ["q_proj"], "learning_rate": "1e-5"}
    assert file.lines == {"beta": 2, "lora_target_modules": 4, "learning_rate": 6}
    assert file.where("beta") == f"{tmp_path / 'recipe.yaml'}, line 2"


def test_the_environment_is_not_a_field(read):
    file = read("env:\n  NCCL_DEBUG: INFO\n  OMP_NUM_THREADS: 4\nbeta: 0.2\n")
    assert file.environment == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}
    assert file.values == {"beta": 0.2}


def test_anchors(read):
    file = read("base: &base {beta: 0.2, seed: 1}\n<<: *base\nseed: 2\n")
    assert file.values == {"base": {"beta": 0.2, "seed": 1}, "beta": 0.2, "seed": 2}


def test_an_empty_file(read):
    assert read("").values == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nseed: 1\nbeta: 0.2\n", "`beta` is set twice, on lines 1 and 3"),
        ("- beta\n", "not a list"),
        ("beta\n", "not a single value"),
        ("beta: [1\n", "line 2: not valid YAML"),
        ("seed: 1\nenv: [A]\n", "line 2: `env` must be a mapping"),
    ],
)
def test_files_that_are_not_recipes(read, text, message):
    with pytest.raises(UserError, match=message):
        read(text)
