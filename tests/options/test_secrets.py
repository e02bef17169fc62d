"""What counts as a secret, and the doors that it is kept from."""

import copy
import json
import pickle

import pytest

from orpo_dist import ORPOConfig
from orpo_dist.options.secrets import (
    PRIVATE_FLAGS,
    holds_secret,
    private_environment,
    public_environment,
    secrets_of,
    split_flags,
    with_private_flags,
    without_password,
    without_secrets,
    write_private,
)

PLANTED = "planted-token-one"
HUB = "hf_abcdefghijkl"


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"hub_token": PLANTED, "beta": 0.1}, {"beta": 0.1}),
        ({"a": [{"api_key": PLANTED, "b": 1}]}, {"a": [{"b": 1}]}),
        ({"a": {"b": [{"c": {"password": PLANTED}}]}}, {"a": {"b": [{"c": {}}]}}),
        ({"a": ({"token": PLANTED},)}, {"a": ({},)}),
        ({"api_keys": [PLANTED, PLANTED]}, {}),
        ({"secrets": {"a": PLANTED}}, {}),
        ({"note": HUB, "notes": ["x", HUB]}, {"notes": ["x"]}),
        ({"note": "Bearer abcdefghij"}, {}),
        ({"a": "https://me:word@host/x.json"}, {"a": "https://host/x.json"}),
        ({"a": ["s3://key:word@host/x"]}, {"a": ["s3://host/x"]}),
        ({"a": "https://host/x?token=abc&b=1"}, {"a": "https://host/x?b=1"}),
        ({"a": "https://host/x?X-Amz-Signature=abc"}, {"a": "https://host/x"}),
        ({"kwargs": json.dumps({"token": PLANTED, "b": 1})}, {"kwargs": '{"b": 1}'}),
    ],
)
def test_what_is_left_of_options(options, left):
    before = copy.deepcopy(options)
    assert without_secrets(options) == left
    assert options == before
    assert PLANTED not in str(without_secrets(options))
    assert secrets_of(options).keys() == {name for name in options if name not in left or left[name] != options[name]}


@pytest.mark.parametrize(
    "options",
    [
        {"add_eos_token": True, "token": None, "max_tokens": 5},
        {"pad_token": "<pad>", "eos_token": "</s>", "image_token": "<image>"},
        {"model_revision": "0123456789" * 4, "tokenizer": "a/b", "tokens": "x"},
        {"dataset_name": "hf://datasets/a/b@main/x.json", "url": "https://host/x?page=2", "push_to_hub": True},
        {"model_init_kwargs": '{"a": 1}', "optim_args": "[broken", "group": "keyboard"},
    ],
)
def test_what_is_no_secret(options):
    assert without_secrets(options) == options
    assert secrets_of(options) == {}


@pytest.mark.parametrize("value", ["sk-abcdefghijklmnopqrst", "ghp_" + "a" * 36, "AKIAABCDEFGHIJKLMNOP", "ftp://a:b@c"])
def test_variables_with_a_harmless_name(value):
    assert public_environment({"THING": value, "NCCL_DEBUG": "INFO"}) == {"NCCL_DEBUG": "INFO"}


def test_flags():
    flags = ["--beta", "0.1", "--hub_token", PLANTED, "--push_to_hub", "--hub-token=b", "--model_init_kwargs"]
    flags += ['{"token": "c"}', "--dataset_name", "https://a:d@host/x", "--no_bf16", "--model_revision", "0" * 40]
    public, private = split_flags(flags)
    assert public == ["--beta", "0.1", "--push_to_hub", "--no_bf16", "--model_revision", "0" * 40]
    assert private == [word for word in flags if word not in public]


def test_private_flags_arrive_once_in_the_environment(monkeypatch):
    assert private_environment([]) == {}
    variables = private_environment(["--hub_token", PLANTED])
    monkeypatch.setenv(PRIVATE_FLAGS, variables[PRIVATE_FLAGS])
    more = private_environment(["--hub_token", "b"])
    assert json.loads(more[PRIVATE_FLAGS]) == ["--hub_token", PLANTED, "--hub_token", "b"]
    assert with_private_flags(["--beta", "1"]) == ["--beta", "1", "--hub_token", PLANTED]
    assert with_private_flags(["--beta", "1"]) == ["--beta", "1"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("--export=ALL,HF_TOKEN=abc", True),
        ("--export=WANDB_API_KEY=abc", True),
        ("--comment=hf_abcdefghijkl", True),
        ("--mail-user=me@host", False),
        ("--export=ALL", False),
        ("--gres=gpu:8", False),
    ],
)
def test_texts(text, found):
    assert holds_secret(text) is found


def test_a_url_without_a_password_is_left_alone():
    for text in ("https://host/a@b?x=1", "a:b@c", "no url", "hf://datasets/a/b@main"):
        assert without_password(text) == text


def test_a_pickled_config_has_no_credentials_and_a_copy_has(tmp_path):
    extra = {"token": PLANTED, "a": [1]}
    args = ORPOConfig(str(tmp_path), hub_token=PLANTED, model_init_kwargs=extra, use_cpu=True)
    assert PLANTED.encode() not in pickle.dumps(args)
    loaded = pickle.loads(pickle.dumps(args))
    assert (loaded.hub_token, loaded.model_init_kwargs) == (None, {"a": [1]})
    assert loaded.output_dir == args.output_dir
    for copied in (copy.copy(args), copy.deepcopy(args)):
        assert (copied.hub_token, copied.model_init_kwargs) == (PLANTED, extra)
        copied.hub_token = None
        assert args.hub_token == PLANTED
    copy.deepcopy(args).model_init_kwargs["a"].append(2)
    assert extra["a"] == [1]


def test_a_private_file_is_only_its_owners(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == "new"
