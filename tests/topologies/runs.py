"""Runs of one model on one process and on two, and what must be equal between them."""

import random

import pytest

from tests.launching.launch import run_worker

STEPS = 8
CONFIG = dict(
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    max_steps=STEPS,
    learning_rate=0.1,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=1.0,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    gradient_checkpointing=False,
    max_length=None,
    eval_strategy="steps",
    eval_steps=STEPS,
    per_device_eval_batch_size=3,
)
SPLIT = {**CONFIG, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
# At 0.1 LoRA's training is unstable: rounding grows eightfold per step, on one process as on two.
GENTLE, GENTLE_SPLIT = {**CONFIG, "learning_rate": 0.02}, {**SPLIT, "learning_rate": 0.02}
LORA = dict(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
SKIP_IN_LOG = {"train_loss", "total_flos", "padded_tokens_ratio", "peak_memory_gib"}


def pairs(n, vocab, seed):
    """Tokenised pairs of very unequal length."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(4, vocab) for _ in range(rng.randint(low, high))]

    return [{"prompt_ids": ids(2, 60), "chosen_ids": ids(1, 40), "rejected_ids": ids(1, 40)} for _ in range(n)]


def run(setting, name, config, launcher=None, launcher_changes=None, processes=2, **more):
    settings = {key: setting[key] for key in ("model", "tokenizer", "train", "eval")}
    if "load_in_4bit" in more:
        settings["model"] = str(setting["folder"] / "wide")
    settings |= {"config": config, **more}
    out = setting["folder"] / name
    return run_worker(settings, out, launcher, processes=processes, launcher_changes=launcher_changes)


def assert_same(outcome, reference, weight_tolerance=1e-5, world_size=2):
    assert outcome.facts["world_size"] == world_size
    assert len(outcome.log) == len(reference.log)
    for ours, theirs in zip(outcome.log, reference.log, strict=True):
        for key in theirs.keys() - SKIP_IN_LOG:
            if "runtime" in key or "per_second" in key or "preparation_time" in key:  # of the machine, not the run
                continue
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=2e-6), (key, theirs["step"])
    assert sum("loss" in row for row in outcome.log) == STEPS
    assert any("eval_rewards/margins" in row for row in outcome.log)
    assert outcome.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        difference = (outcome.weights[name] - weight).abs().max()
        assert difference <= weight_tolerance * weight.abs().max() + 1e-8, (name, difference)
