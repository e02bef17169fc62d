"""A tiny vision-language model learns by ORPO alone, from untrained weights, to look at the image: `make test-vlm`."""

import pytest

from orpo_dist import ORPOConfig, ORPOTrainer
from tests.vlm.drawn_world import SCENES, SEEN, UNSEEN, held_out_pairs, model, processor, training_pairs


@pytest.mark.slow
def test_preferences_follow_the_image_on_unseen_combinations(tmp_path):
    for part in ("count", "colour", "shape"):
        assert {getattr(scene, part) for scene in SEEN} == {getattr(scene, part) for scene in SCENES}
    assert not set(SEEN) & set(UNSEEN) and len(UNSEEN) == len(SCENES) // 3
    made = processor()
    held_out = held_out_pairs(made, 400)
    trainer = ORPOTrainer(
        model(len(made.tokenizer)),
        ORPOConfig(
            tmp_path,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=50,
            num_train_epochs=4,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            beta=1.0,
            nll_scope="completion",
            train_vision_tower=True,
            train_projector=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            max_length=None,
        ),
        train_dataset=training_pairs(made, 1600),
        processing_class=made,
    )
    untrained = accuracy(trainer, held_out.right)
    trainer.train()
    right, swapped, other = (accuracy(trainer, rows) for rows in (held_out.right, held_out.swapped, held_out.other))
    print(f"untrained {untrained:.3f}, right {right:.3f}, swapped {swapped:.3f}, other {other:.3f}")
    assert trainer.layout.is_packed
    assert 0.4 <= untrained <= 0.6
    assert right >= 0.90
    assert swapped <= 0.10
    assert 0.4 <= other <= 0.6


def accuracy(trainer: ORPOTrainer, rows: list[dict]) -> float:
    return trainer.evaluate(rows)["eval_rewards/accuracies"]
