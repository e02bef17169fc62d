"""What a run is made of: equal for the same run, another one for every change that moves the weights."""

import datasets
import pytest
from transformers import LlamaForCausalLM

from orpo_dist import ORPOConfig
from orpo_dist.packing.lengths import pair_lengths
from orpo_dist.run.fingerprint import differences, fingerprint

ROWS = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [n]} for n in range(4, 9)]


@pytest.fixture
def of(tmp_path, tiny_llama):
    def make(rows=ROWS, model=None, global_batch=8, **options):
        args = ORPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
        return fingerprint(args, model or tiny_llama(64), rows, pair_lengths(rows), global_batch)

    return make


def changed(before, after):
    return [line for part in ("model", "data", "options") for line in differences(before, after, part)]


def test_the_same_run_is_equal(of):
    before = of()
    assert changed(before, of()) == []
    assert changed(before, of(datasets.Dataset.from_list(ROWS))) == []
    assert changed(before, of(max_steps=99, logging_steps=7, per_device_train_batch_size=1)) == []


def test_options_that_move_the_weights(of):
    assert changed(of(), of(beta=0.5)) == ["beta: 0.1 -> 0.5"]
    assert changed(of(), of(global_batch=16)) == ["global batch: 8 -> 16"]


def test_rows(of):
    other_token = [*ROWS[:4], {**ROWS[4], "chosen_ids": [9]}]
    assert [line.split(":")[0] for line in changed(of(), of(other_token))] == ["content"]
    assert [line.split(":")[0] for line in changed(of(), of(ROWS[:4]))] == ["pairs", "content"]


def test_weights_that_train(of, tiny_llama):
    frozen = tiny_llama(64)
    frozen.get_input_embeddings().weight.requires_grad = False
    assert [line.split(":")[0] for line in changed(of(), of(model=frozen))] == ["parameters"]


def test_an_entry_that_one_side_lacks():
    assert differences({"options": {"a": 1}}, {"options": {"b": 2}}, "options") == ["a: 1 -> none", "b: none -> 2"]
    assert differences({}, {"options": {"b": 2}}, "options") == ["b: none -> 2"]


def test_a_local_model_is_its_content_and_not_its_path(of, tiny_llama, tmp_path):
    for name in ("here", "there"):
        tiny_llama(64).save_pretrained(tmp_path / name)
    load = LlamaForCausalLM.from_pretrained
    here, there = of(model=load(tmp_path / "here")), of(model=load(tmp_path / "there"))
    assert changed(here, there) == []
    other = load(tmp_path / "here")
    other.model.norm.weight.data[0] += 1
    other.save_pretrained(tmp_path / "there")
    assert [line.split(":")[0] for line in changed(here, of(model=load(tmp_path / "there")))] == ["content"]


def test_a_checkpoint_without_content_is_compared_by_path():
    old, new = {"model": {"name": "/a"}}, {"model": {"name": "/b", "content": "1"}}
    assert differences(old, new, "model") == ["name: /a -> /b"]
    assert differences({"model": {"name": "/b"}}, new, "model") == []
