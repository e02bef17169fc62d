"""Short runs of the trainer on tokenised pairs, and what is compared between them."""

import random

from orpo_dist import ORPOConfig


def pairs(n, vocab, seed=0, longest=40):
    """Tokenised pairs of very unequal length."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(4, vocab) for _ in range(rng.randint(low, high))]

    return [
        {"prompt_ids": ids(1, longest), "chosen_ids": ids(1, longest), "rejected_ids": ids(1, longest)}
        for _ in range(n)
    ]


def config(folder, **more):
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    return ORPOConfig(**{**defaults, **more})


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same_weights(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert (ours[name] - weight).abs().max() <= tolerance * weight.abs().max() + 1e-8, name


def largest_difference(ours, theirs):
    return max((ours[name] - weight).abs().max().item() for name, weight in theirs.items())
