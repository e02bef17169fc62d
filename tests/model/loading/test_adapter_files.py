"""Adapters by their names in a folder, and checkpoints of several of them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from orpo_dist import ORPOTrainer
from orpo_dist.model.loading.adapter_files import adapter_folder, adapters_in, load_adapters, saved_embeddings
from tests.trainer_runs import config, pairs

VOCAB = 64


def two_adapters(model, active):
    """`tone` and `style`, far from their initial values."""
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False), adapter_name="tone"
    )
    adapted.add_adapter("style", LoraConfig(task_type="CAUSAL_LM", r=3, init_lora_weights=False))
    adapted.base_model.set_adapter(active)
    return adapted


def test_names_in_a_folder(tmp_path, tiny_llama):
    assert adapters_in(tmp_path) == []
    two_adapters(tiny_llama(VOCAB), "tone").save_pretrained(tmp_path)
    for other in ("checkpoint-3", "_saving", "another_run"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "adapter_config.json").write_text("{}")
    (tmp_path / "another_run" / "training_args.bin").touch()
    assert adapters_in(tmp_path) == ["style", "tone"]
    get_peft_model(tiny_llama(VOCAB), LoraConfig(r=2)).save_pretrained(tmp_path)
    assert adapters_in(tmp_path) == ["default", "style", "tone"]
    assert adapter_folder(tmp_path, "default") == tmp_path and adapter_folder(tmp_path, "tone") == tmp_path / "tone"


def test_every_adapter_is_loaded_and_nothing_else_changes(tmp_path, tiny_llama):
    torch.manual_seed(1)
    saved = two_adapters(tiny_llama(VOCAB), "tone")
    saved.save_pretrained(tmp_path)
    torch.manual_seed(2)
    model = two_adapters(tiny_llama(VOCAB), ["tone", "style"])
    active, trains = list(model.active_adapters), [p.requires_grad for p in model.parameters()]
    load_adapters(model, tmp_path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert list(model.active_adapters) == active and [p.requires_grad for p in model.parameters()] == trains


def test_embeddings_in_the_file(tmp_path, tiny_llama):
    model = tiny_llama(VOCAB)
    get_peft_model(model, LoraConfig(r=2)).save_pretrained(tmp_path)
    assert saved_embeddings(tiny_llama(VOCAB), tmp_path) == []
    settings = LoraConfig(r=2, modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(tiny_llama(VOCAB), settings).save_pretrained(tmp_path)
    assert saved_embeddings(tiny_llama(VOCAB), tmp_path) == [(VOCAB, 32), (VOCAB, 32)]


@pytest.mark.parametrize("active", ["style", ["tone", "style"]])
def test_best_model_and_resuming(tmp_path, tiny_llama, chat_tokenizer, active):
    """transformers looks for the best model in the folder of `default` alone."""

    def trainer(resume=None, **more):
        torch.manual_seed(3)
        made = ORPOTrainer(
            two_adapters(tiny_llama(VOCAB), active),
            config(
                tmp_path / "run", learning_rate=0.5, save_strategy="steps", save_steps=1, eval_strategy="steps",
                eval_steps=1, metric_for_best_model="eval_rewards/margins", greater_is_better=False, **more,
            ),
            train_dataset=pairs(12, VOCAB),
            eval_dataset=pairs(3, VOCAB, seed=1),
            processing_class=chat_tokenizer,
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        return made

    whole = trainer()
    resumed = trainer(str(tmp_path / "run" / "checkpoint-1"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    best = trainer(load_best_model_at_end=True)
    expected = two_adapters(tiny_llama(VOCAB), active)
    folder = tmp_path / "run" / "checkpoint-1"
    best.state.best_model_checkpoint = str(folder)  # whichever it was: another than the last
    best._load_best_model()
    load_adapters(expected, folder)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(best.model.state_dict()[name], tensor), name
