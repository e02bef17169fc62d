"""Options of AutoTrain's other trainers: accepted, named in a note, documented."""

from dataclasses import fields

from orpo_dist.autotrain.ignored_options import IGNORED
from orpo_dist.autotrain.project import LLMTrainingParams
from orpo_dist.autotrain.setup import set_up
from tests.autotrain.options import DOCS, params, recipe


def test_options_of_other_trainers_are_named():
    made = params(rl_gamma=0.9, use_sweep=True, unsloth=True, rl_top_k=3)
    note = set_up(made).notes[0]
    assert "rl_gamma, rl_top_k (PPO and GRPO)" in note and "use_sweep (sweeps)" in note and "unsloth" in note
    assert made.to_recipe_mapping() == recipe()


def test_foreign_and_own_options_do_not_overlap():
    assert not IGNORED.keys() & {option.name for option in fields(LLMTrainingParams)}


def test_the_docs_list_every_foreign_option():
    text = DOCS.read_text()
    assert [name for name in IGNORED if f"`{name}`" not in text] == []
