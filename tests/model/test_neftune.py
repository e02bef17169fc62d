import pytest
import torch
from peft import LoraConfig
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback

from orpo_dist import ORPOTrainer
from orpo_dist.model.neftune import EmbeddingNoise
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.padded import PaddedCollator
from tests.trainer_runs import assert_same_weights, config, largest_difference, pairs, weights

ALPHA = 5.0
WIDTH = 32
ROWS = [
    {"prompt_ids": [5] * p, "chosen_ids": [6] * c, "rejected_ids": [7] * r, "weight": 1.0, "index": i}
    for i, (p, c, r) in enumerate([(3, 4, 2), (10, 1, 30), (1, 1, 1)])
]


def noise_of(model, batch, step=0, alpha=ALPHA):
    """What is added to the embeddings of a batch."""
    noise = EmbeddingNoise(alpha, seed=1)
    embed = model.get_input_embeddings()
    with noise.attach(model), noise.of(batch, step):
        return (embed(batch["input_ids"]) - torch.nn.functional.embedding(batch["input_ids"], embed.weight)).detach()


def by_sequence(batch, noise):
    """(pair, side) -> the noise of its tokens."""
    layout, found = batch["orpo_layout"], {}
    if noise.shape[0] == 1:
        for pair, s in zip(layout.index, layout.segments, strict=True):
            found[pair, "chosen"] = noise[0, s.start : s.start + s.prompt + s.chosen]
            found[pair, "rejected"] = noise[0, s.rejected_start - s.prompt : s.rejected_start + s.rejected]
        return found
    for row, mask in enumerate(batch["attention_mask"].bool()):
        side = "chosen" if row < len(layout.index) else "rejected"
        found[layout.index[row % len(layout.index)], side] = noise[row, mask]
        assert not noise[row, ~mask].any()
    return found


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(64).train()


@pytest.mark.parametrize("collator", [PackedCollator(False, "sequence"), PaddedCollator(0, "sequence")])
def test_the_noise_of_a_sequence_has_its_own_length_in_it(model, collator):
    batch = collator(ROWS)
    for (pair, side), noise in by_sequence(batch, noise_of(model, batch)).items():
        length = len(ROWS[pair]["prompt_ids"]) + len(ROWS[pair][f"{side}_ids"])
        assert noise.shape == (length, WIDTH)
        bound = ALPHA / (length * WIDTH) ** 0.5
        assert 0.9 * bound < noise.abs().max() <= bound
        assert noise.std() == pytest.approx(bound / 3**0.5, rel=0.2)  # uniform


def test_it_does_not_depend_on_the_cut_or_the_layout(model):
    whole = by_sequence(batch := PackedCollator(False, "sequence")(ROWS), noise_of(model, batch))
    for collator in (PackedCollator(False, "sequence"), PaddedCollator(0, "sequence")):
        for rows in (ROWS[2:], ROWS[:2][::-1]):
            batch = collator(rows)
            for name, noise in by_sequence(batch, noise_of(model, batch)).items():
                assert torch.allclose(noise, whole[name], atol=1e-6)
    assert not torch.equal(whole[2, "chosen"], whole[2, "rejected"])
    other = by_sequence(batch, noise_of(model, batch, step=1))
    assert all(not torch.allclose(noise, whole[name], atol=1e-3) for name, noise in other.items())


def test_a_shared_prompt_has_the_noise_of_the_chosen_sequence(model):
    shared, plain = PackedCollator(True, "sequence")(ROWS), PackedCollator(False, "sequence")(ROWS)
    expected, noise = by_sequence(plain, noise_of(model, plain)), noise_of(model, shared)
    for pair, s in enumerate(shared["orpo_layout"].segments):
        assert torch.allclose(noise[0, s.start : s.rejected_start], expected[pair, "chosen"], atol=1e-6)
        after = noise[0, s.rejected_start : s.rejected_start + s.rejected]
        assert torch.allclose(after, expected[pair, "rejected"][s.prompt :], atol=1e-6)


def test_there_is_none_outside_of_training(model):
    batch = PaddedCollator(0, "sequence")(ROWS)
    assert not noise_of(model.eval(), batch).any()
    noise, embed = EmbeddingNoise(ALPHA, 0), model.train().get_input_embeddings()
    handle = noise.attach(model)
    assert torch.equal(embed(batch["input_ids"]), torch.nn.functional.embedding(batch["input_ids"], embed.weight))
    handle.undo()
    assert not embed._forward_hooks


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0)])
def test_one_micro_batch_of_eight_is_eight_of_one(trained, chat_tokenizer, adapter):
    rows = pairs(8, len(chat_tokenizer))
    options = dict(neftune_noise_alpha=ALPHA, max_steps=2)
    whole = trained(rows, peft_config=adapter, per_device_train_batch_size=8, **options)
    without = trained(rows, peft_config=adapter, per_device_train_batch_size=8, max_steps=2)
    for more in (dict(), dict(padding_free=False)):
        cut = trained(
            rows,
            peft_config=adapter,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=8,
            **options,
            **more,
        )
        assert_same_weights(weights(cut), weights(whole))
        assert cut.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-4)
    assert largest_difference(weights(without), weights(whole)) > 1e-4
    assert not whole.model.get_input_embeddings()._forward_hooks
    assert not whole.layout.prefix_sharing


class Hooks(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.during = len(model.get_input_embeddings()._forward_hooks)


def test_only_one_hook_is_there_and_none_afterwards(tmp_path, chat_tokenizer, tiny_llama):
    """Neither the Trainer's own beside ours, nor one more for each train()."""
    hooks = Hooks()
    trainer = ORPOTrainer(
        tiny_llama(len(chat_tokenizer)),
        config(tmp_path, neftune_noise_alpha=ALPHA, max_steps=1),
        train_dataset=pairs(4, len(chat_tokenizer)),
        processing_class=chat_tokenizer,
        callbacks=[hooks],
    )
    for _ in range(2):
        trainer.train()
        assert hooks.during == 1
        assert not trainer.model.get_input_embeddings()._forward_hooks


def test_encoder_and_decoder_have_their_own(tmp_path, chat_tokenizer):
    torch.manual_seed(0)
    small = dict(vocab_size=len(chat_tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    runs = []
    for size, accumulation in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0, pad_token_id=0))
        trainer = ORPOTrainer(
            model,
            config(
                tmp_path / str(size),
                neftune_noise_alpha=ALPHA,
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
            ),
            train_dataset=pairs(4, len(chat_tokenizer)),
            processing_class=chat_tokenizer,
        )
        trainer.train()
        runs.append(weights(trainer))
    assert_same_weights(runs[1], runs[0])
