"""Trackers that are asked for and cannot be used."""

import logging
import os

import pytest
from accelerate import PartialState

from orpo_dist.errors import UserError
from orpo_dist.run import trackers
from orpo_dist.run.trackers import tensorboard_folder, usable_trackers


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with these trackers installed, without any key."""

    def build(*installed: str) -> None:
        monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: list(installed))

    PartialState()  # warnings ask it which process this is
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "COMET_API_KEY", "COMET_START_ONLINE"):
        # setenv first: what the code under test sets is then undone, even where nothing was set before
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return build


def test_without_the_package_it_is_a_warning(machine, caplog):
    machine("tensorboard")
    with caplog.at_level(logging.WARNING):
        assert usable_trackers(["wandb", "tensorboard", "comet_ml"]) == ["tensorboard"]
    assert "pip install wandb" in caplog.text
    assert "pip install comet-ml" in caplog.text


def test_wandb_without_a_key_logs_offline(machine, caplog):
    machine("wandb")
    with caplog.at_level(logging.WARNING):
        assert usable_trackers(["wandb"]) == ["wandb"]
    assert os.environ["WANDB_MODE"] == "offline"
    assert "no API key" in caplog.text


@pytest.mark.parametrize("source", ["variable", "netrc", "own server", "mode"])
def test_wandb_with_a_key_is_left_alone(machine, monkeypatch, tmp_path, caplog, source):
    machine("wandb")
    if source == "variable":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    if source == "netrc":
        (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password xyz\n")
    if source == "own server":
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.site.org:8080")
        (tmp_path / "netrc").write_text("machine wandb.site.org\n  login user\n  password xyz\n")
    if source == "mode":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    assert usable_trackers(["wandb"]) == ["wandb"]
    assert os.environ.get("WANDB_MODE") == ("disabled" if source == "mode" else None)
    assert not caplog.records


def test_a_key_for_another_server_does_not_count(machine, tmp_path):
    machine("wandb")
    (tmp_path / "netrc").write_text("machine huggingface.co\n  login user\n  password xyz\n")
    usable_trackers(["wandb"])
    assert os.environ["WANDB_MODE"] == "offline"


def test_comet_without_a_key_logs_offline(machine, monkeypatch, tmp_path):
    machine("comet_ml")
    assert usable_trackers(["comet_ml"]) == ["comet_ml"]
    assert os.environ["COMET_START_ONLINE"] == "0"
    monkeypatch.delenv("COMET_START_ONLINE")
    (tmp_path / ".comet.config").write_text("[comet]\n")
    usable_trackers(["comet_ml"])
    assert "COMET_START_ONLINE" not in os.environ


def test_unknown_names_are_refused(machine):
    machine()
    with pytest.raises(UserError, match=r"Did you mean tensorboard\?"):
        usable_trackers(["tensorbord"])


def test_tensorboard_folder_holds_for_the_callback_only(monkeypatch, tmp_path):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    with tensorboard_folder(tmp_path):
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "/mine")
    with tensorboard_folder(tmp_path):
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == "/mine"


def test_other_ranks_are_silent(machine, monkeypatch, caplog):
    machine()
    monkeypatch.setenv("RANK", "1")
    assert usable_trackers(["wandb"]) == []
    assert not caplog.records
