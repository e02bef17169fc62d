"""docs/drop_in.md names every option of TrainingArguments and every method of the two trainers, and what it says holds.

A new version of transformers or TRL that adds one fails here until somebody has looked at it.
"""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_dist import ORPOTrainer
from orpo_dist.errors import UserError
from orpo_dist.training.overrides import REFUSED
from tests.trainer_runs import config, pairs

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "drop_in.md").read_text(encoding="utf-8")
VERDICTS = ("works", "differs", "no effect", "refused")

# A value of every option that is refused, wholly or for this value.
REFUSED_VALUES = {
    "average_tokens_across_devices": False,
    "label_smoothing_factor": 0.1,
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "save_on_each_node": True,
    "enable_jit_checkpoint": True,
    "dataloader_in_order": False,
    "label_names": ["labels"],
    "length_column_name": "tokens",
}
PARTLY_REFUSED = [
    ("train_sampling_strategy", "group_by_length", "train_sampling_strategy=group_by_length"),
    ("accelerator_config", {"split_batches": True}, "accelerator_config.split_batches"),
    ("accelerator_config", {"dispatch_batches": True}, "accelerator_config.dispatch_batches"),
    ("accelerator_config", {"even_batches": False}, "accelerator_config.even_batches"),
]


def table(name: str) -> dict[str, str]:
    (text,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))


def refused(name: str) -> set[str]:
    return {row for row, verdict in table(name).items() if verdict.startswith("refused")}


@pytest.mark.parametrize("name", ["training arguments", "trainer methods", "trl methods"])
def test_every_row_says_what_happens(name):
    assert [row for row, verdict in table(name).items() if not verdict.startswith(VERDICTS)] == []


def test_every_option_of_transformers_is_in_the_table():
    assert {field.name for field in fields(TrainingArguments)} - table("training arguments").keys() == set()


def test_every_public_method_of_the_trainer_is_in_the_table():
    methods = {name for name in vars(Trainer) if not name.startswith("_") and callable(getattr(Trainer, name))}
    assert methods - table("trainer methods").keys() == set()


def test_every_method_of_trls_trainer_is_in_the_table():
    own = [kind for kind in TRLTrainer.__mro__ if kind not in Trainer.__mro__]
    methods = {name for kind in own for name in vars(kind) if callable(getattr(kind, name))}
    methods = {name for name in methods if not name.startswith("__")} - {"_send_telemetry", "_save_checkpoint"}
    assert methods - table("trl methods").keys() == set()


def test_the_refused_methods_are_those_of_the_code():
    assert refused("trainer methods") | refused("trl methods") == REFUSED.keys()
    works = table("trl methods").keys() - refused("trl methods")
    assert [name for name in works if not hasattr(ORPOTrainer, name)] == []


def test_every_refused_option_has_a_value_below():
    assert refused("training arguments") == REFUSED_VALUES.keys()


@pytest.mark.parametrize(
    "name, value, named", [*((name, value, name) for name, value in REFUSED_VALUES.items()), *PARTLY_REFUSED]
)
def test_a_refused_option_is_an_error_that_names_it(tmp_path, chat_tokenizer, name, value, named):
    with pytest.raises(UserError, match=named):
        ORPOTrainer(  # before rows or a model are looked at
            "no model",
            config(tmp_path, **{name: value}),
            train_dataset="no rows",
            processing_class=chat_tokenizer,
        )


def test_fewer_pairs_than_a_global_batch(tmp_path, chat_tokenizer, tiny_llama):
    """dataloader_drop_last would leave no step; both numbers are named."""

    def build(**more):
        return ORPOTrainer(
            tiny_llama(len(chat_tokenizer)),
            config(tmp_path, dataloader_drop_last=True, **more),
            train_dataset=pairs(3, len(chat_tokenizer)),
            processing_class=chat_tokenizer,
        )

    with pytest.raises(UserError, match="3 training pairs are fewer than a global batch of 8"):
        build(gradient_accumulation_steps=2)
    build(per_device_train_batch_size=3)


def test_compute_metrics_is_not_called_where_only_the_loss_is_wanted(tmp_path, chat_tokenizer, tiny_llama):
    rows = pairs(4, len(chat_tokenizer))
    trainer = ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        config(tmp_path, prediction_loss_only=True),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=chat_tokenizer,
        compute_metrics=lambda prediction: {"mine": 1.0},
    )
    assert "eval_mine" not in trainer.evaluate()
    assert trainer.predict(rows).predictions is None


@pytest.mark.parametrize("counted", ["all", "non_padding"])
def test_every_token_of_a_packed_row_is_counted(tmp_path, chat_tokenizer, tiny_llama, counted):
    """Also one that is the tokenizer's pad token."""
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 0], "rejected_ids": [8, 0]}] * 4
    trainer = ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        config(tmp_path, max_steps=1, include_num_input_tokens_seen=counted),
        train_dataset=rows,
        processing_class=chat_tokenizer,
    )
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 4 * 6
