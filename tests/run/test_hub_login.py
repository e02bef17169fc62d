"""Before a run that ends on the hub."""

import os
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from orpo_dist.errors import UserError
from orpo_dist.run.hub_login import check_login, move_token_to_environment


def test_the_token_leaves_the_arguments(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "before")
    args = SimpleNamespace(hub_token=None)
    move_token_to_environment(args)
    assert os.environ["HF_TOKEN"] == "before"
    args.hub_token = "hf_mine"
    move_token_to_environment(args)
    assert os.environ["HF_TOKEN"] == "hf_mine" and args.hub_token is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("x"), "hf auth login"),
        (OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
        (ConnectionError("no route\nto host"), r"\(no route\)"),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_training(monkeypatch, error, message):
    def whoami(self):
        raise error

    monkeypatch.setattr("orpo_dist.run.hub_login.HfApi.whoami", whoami)
    with pytest.raises(UserError, match=message):
        check_login()


def test_a_login(monkeypatch):
    monkeypatch.setattr("orpo_dist.run.hub_login.HfApi.whoami", lambda self: {"name": "me"})
    check_login()
