"""What must never be written to a run's folder."""

import pytest

from orpo_dist.recipe.secrets import public_environment, without_secrets


def test_credentials_go_by_their_name_at_any_depth():
    options = {
        "hub_token": "hf_abcdefghijkl",
        "api_key": "x",
        "beta": 0.1,
        "nested": {"WANDB_API_KEY": "x", "db_password": "x", "name": "a"},
    }
    assert without_secrets(options) == {"beta": 0.1, "nested": {"name": "a"}}
    assert "hub_token" in options and "db_password" in options["nested"]  # a copy


def test_only_texts_are_credentials():
    options = {"add_eos_token": True, "pad_token": None, "max_token": 5}
    assert without_secrets(options) == options


@pytest.mark.parametrize(
    ("name", "value", "public"),
    [
        ("NCCL_DEBUG", "INFO", True),
        ("HF_HOME", "/shared/hf", True),
        ("HF_TOKEN", "anything", False),
        ("AWS_SECRET", "anything", False),
        ("PROXY", "http://proxy:3128", True),
        ("PROXY", "http://me:word@proxy:3128", False),
        ("THING", "hf_abcdefghijkl", False),
        ("THING", "0123456789" * 4, False),
        ("COMMIT", "0123456789", True),
    ],
)
def test_variables(name, value, public):
    assert public_environment({name: value}) == ({name: value} if public else {})
