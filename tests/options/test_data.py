"""The one declaration of each data option: what config, data step, docs and AutoTrain make of it."""

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

from orpo_dist.autotrain.params import LLMTrainingParams
from orpo_dist.config import ORPOConfig
from orpo_dist.options.data import MAX_LENGTH, DataOptions, ImageOptions, PrepareOptions, asked_length

DOCS = Path(__file__).parents[2] / "docs"
SHOWN = {True: "true", False: "false", None: "none"}


def table(options: type) -> str:
    lines = ["| option | default | meaning, and what it changes |", "|---|---|---|"]
    for option in fields(options):
        is_word = isinstance(option.default, bool) or option.default is None
        default = SHOWN[option.default] if is_word else str(option.default)
        lines.append(f"| `{option.name}` | {default} | {option.metadata['help']} |")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("page", "marker", "options"),
    [
        ("config.md", "data options", DataOptions),
        ("config.md", "image options", ImageOptions),
        ("data.md", "data options", DataOptions),
    ],
)
def test_the_tables_of_the_docs_are_made_from_it(page, marker, options):
    """ORPO_DIST_UPDATE_GOLDEN=1 writes them anew."""
    text = (DOCS / page).read_text("utf-8")
    made = f"<!-- {marker} -->\n{table(options)}\n<!-- end -->"
    written = re.sub(rf"<!-- {marker} -->\n.*?<!-- end -->", lambda match: made, text, flags=re.DOTALL)
    if os.environ.get("ORPO_DIST_UPDATE_GOLDEN"):
        (DOCS / page).write_text(written, "utf-8")
    assert made in text or os.environ.get("ORPO_DIST_UPDATE_GOLDEN"), f"ORPO_DIST_UPDATE_GOLDEN=1 updates {page}"


def test_the_config_and_the_data_step_have_the_same_defaults(tmp_path):
    config = ORPOConfig(str(tmp_path), use_cpu=True)
    prepared = config.prepare_options(is_encoder_decoder=False)
    for option in fields(DataOptions):
        assert getattr(config, option.name) == option.default == getattr(PrepareOptions(), option.name)
        assert getattr(prepared, option.name) == option.default, option.name


def test_every_data_option_reaches_the_data_step(tmp_path):
    other = {
        "max_length": 99, "max_prompt_length": 9, "max_completion_length": 8, "truncation_side": "right",
        "on_bad_row": "error", "max_bad_rows": 3.0, "chat_template": "chatml", "apply_chat_template": True,
        "allow_template_drops": True, "add_eos_token": False, "split_special_tokens": True,
        "prompt_column": "p", "chosen_column": "c", "rejected_column": "r",
        "system_column": "s", "tools_column": "t", "image_column": "i", "image_folder": "f", "allow_image_urls": True,
        "allow_outside_image_folder": True, "dataset_num_proc": 2,
    }  # fmt: skip
    assert other.keys() == {option.name for option in fields(DataOptions)}
    prepared = ORPOConfig(str(tmp_path), use_cpu=True, **other).prepare_options(is_encoder_decoder=True)
    assert {name: getattr(prepared, name) for name in other} == other and prepared.is_encoder_decoder


def test_encoder_decoders_get_trls_bound_on_completions(tmp_path):
    config = ORPOConfig(str(tmp_path), use_cpu=True)
    assert config.prepare_options(is_encoder_decoder=True).max_completion_length == 128
    assert config.max_completion_length is None


def test_autotrains_options_of_the_same_name_are_the_same():
    theirs = {option.name: option for option in fields(LLMTrainingParams)}
    for option in fields(DataOptions):
        if option.name in theirs and theirs[option.name].metadata["recipe"] == option.name:
            assert theirs[option.name].default == option.default
            assert theirs[option.name].metadata["help"] == option.metadata["help"]


def test_the_default_bound_is_for_text_alone():
    assert (asked_length(MAX_LENGTH, reads_images=True), asked_length(MAX_LENGTH, reads_images=False)) == (None, 1024)
    assert asked_length(1024, reads_images=True) == 1024
