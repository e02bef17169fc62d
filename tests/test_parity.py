"""TRL's ORPOTrainer is the oracle: the same pairs, one micro-batch per global batch, and the two trainers agree."""

import json
from itertools import chain

import pytest
import torch
from trl.experimental.orpo import ORPOConfig as TRLConfig
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_dist import ORPOConfig, ORPOTrainer

datasets = pytest.importorskip("datasets")

STEPS, PAIRS_PER_STEP, MAX_LENGTH = 20, 4, 700
# logits/*: TRL averages over padding and prompts as well, so its value depends on how pairs are batched together.
NOT_COMPARED = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "logits/chosen"}
NOT_COMPARED |= {"logits/rejected", "epoch", "step"}


class InGivenOrder(torch.utils.data.Sampler):
    def __init__(self, order):
        self.order = order

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        return iter(self.order)


class OrderedTRLTrainer(TRLTrainer):
    order = ()

    def _get_train_sampler(self, train_dataset=None):
        return InGivenOrder(self.order)


@pytest.fixture(scope="module")
def real_pairs(shared_data, plain_tokenizer):
    """Pairs of dpo_en_demo.json as strings, those whose prompt leaves room for a completion."""
    rows = json.loads((shared_data / "dpo_en_demo.json").read_text())
    pairs = []
    for row in rows:
        prompt = (
            "\n\n".join(f"{turn['from']}: {turn['value']}" for turn in row["conversations"]) + "\n\ngpt:\n"
        )  # no space that would merge
        if len(plain_tokenizer(prompt, add_special_tokens=False)["input_ids"]) < MAX_LENGTH - 100:
            pairs.append({"prompt": prompt, "chosen": row["chosen"]["value"], "rejected": row["rejected"]["value"]})
    return datasets.Dataset.from_list(pairs[: STEPS * PAIRS_PER_STEP])


def settings(tmp_path, **more):
    return dict(
        output_dir=str(tmp_path),
        per_device_train_batch_size=PAIRS_PER_STEP,
        max_steps=STEPS,
        max_length=MAX_LENGTH,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **more,
    )


def train_both(tmp_path, real_pairs, tokenizer, tiny_llama, padding_free, **more):
    ours = ORPOTrainer(
        tiny_llama(len(tokenizer)),
        ORPOConfig(**settings(tmp_path / "ours", **more), padding_free=padding_free),
        train_dataset=real_pairs,
        processing_class=tokenizer,
    )
    theirs = OrderedTRLTrainer(
        tiny_llama(len(tokenizer)),
        TRLConfig(**settings(tmp_path / "trl", **more)),
        train_dataset=real_pairs,
        processing_class=tokenizer,
    )
    sampler = ours.get_train_dataloader().batch_sampler
    theirs.order = list(chain.from_iterable(sampler.global_batches()))
    assert len(theirs.order) == len(real_pairs) == STEPS * PAIRS_PER_STEP
    ours.train()
    theirs.train()
    return ours, theirs


@pytest.mark.parametrize("optimizer, padding_free", [("sgd", True), ("adamw_torch", True), ("sgd", False)])
def test_twenty_steps_on_real_pairs(tmp_path, real_pairs, plain_tokenizer, tiny_llama, optimizer, padding_free):
    ours, theirs = train_both(
        tmp_path, real_pairs, plain_tokenizer, tiny_llama, optim=optimizer, padding_free=padding_free
    )
    assert ours.layout.is_packed == padding_free
    log, oracle = ours.state.log_history, theirs.state.log_history
    assert len(log) == len(oracle) == STEPS + 1
    for row, expected in zip(log, oracle, strict=True):
        compared = expected.keys() - NOT_COMPARED
        assert row.keys() >= compared
        for key in compared:
            # differences of log-probabilities around 6: their own rounding is 1e-6
            tolerance = 5e-6 if key in ("log_odds_chosen", "rewards/margins") else 0
            assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=tolerance), (key, expected["step"])
    assert {"loss", "grad_norm", "rewards/margins", "nll_loss", "log_odds_ratio", "log_odds_chosen"} <= log[0].keys()
    assert abs(log[0]["loss"] - log[-2]["loss"]) > 1e-3  # something was learnt in between


def test_rows_are_tokenised_like_trls(tmp_path, real_pairs, plain_tokenizer, tiny_llama):
    ours = ORPOTrainer(
        tiny_llama(len(plain_tokenizer)),
        ORPOConfig(**settings(tmp_path / "ours")),
        train_dataset=real_pairs,
        processing_class=plain_tokenizer,
    ).train_dataset
    theirs = TRLTrainer(
        tiny_llama(len(plain_tokenizer)),
        TRLConfig(**settings(tmp_path / "trl")),
        train_dataset=real_pairs,
        processing_class=plain_tokenizer,
    ).train_dataset
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs, strict=True):
        assert row["prompt_ids"] + row["chosen_ids"] == expected["chosen_input_ids"]
        assert row["prompt_ids"] + row["rejected_ids"] == expected["rejected_input_ids"]
        assert [x for x in expected["chosen_labels"] if x != -100] == row["chosen_ids"]
