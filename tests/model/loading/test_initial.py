"""Adapters whose initialisation changes the base: what is saved reproduces the trained model on the base as it came."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from orpo_dist import ORPOTrainer
from orpo_dist.errors import UserError
from orpo_dist.model.loading.adapters import add_adapter
from orpo_dist.model.loading.initial import changes_base, refuse_unsaveable
from orpo_dist.model.loading.merge import merge_run
from tests.trainer_runs import config, pairs

VOCAB = 64
IDS = torch.randint(4, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


def lora(init, **more):
    return LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=init, **more
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def run(tmp_path, chat_tokenizer, tiny_llama):
    """`run(peft_config, ...)`: a trainer after its run on a base that lies in a folder."""
    base = tmp_path / "base"
    tiny_llama(VOCAB).save_pretrained(base)

    def train(peft_config, model=None, resume=None, folder="run", **more):
        trainer = ORPOTrainer(
            model if model is not None else type(tiny_llama(VOCAB)).from_pretrained(base),
            config(tmp_path / folder, **{"learning_rate": 0.5, **more}),
            train_dataset=pairs(16, VOCAB),
            processing_class=chat_tokenizer,
            peft_config=peft_config,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def reloaded(folder, tiny_llama, tmp_path):
    base = type(tiny_llama(VOCAB)).from_pretrained(tmp_path / "base")
    return PeftModel.from_pretrained(base, folder)


CONFIGS = {
    "pissa": {},
    "pissa_niter_2": {},
    "pissa_niter_4": {"use_dora": True},
    "olora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "orthogonal": {},
    "gaussian": {},
}


@pytest.mark.parametrize("init", CONFIGS)
def test_the_saved_adapter_is_the_trained_model(init, run, tiny_llama, tmp_path):
    trainer = run(lora(init, **CONFIGS[init]))
    trained = logits(trainer.model)
    assert (trained - logits(tiny_llama(VOCAB))).abs().max() > 0.01
    trainer.save_model(str(tmp_path / "saved"))
    torch.manual_seed(123)  # what a reload draws must not matter
    torch.testing.assert_close(logits(reloaded(tmp_path / "saved", tiny_llama, tmp_path)), trained, rtol=0, atol=2e-4)
    saved = PeftConfig.from_pretrained(tmp_path / "saved")
    assert saved.r == (8 if changes_base(trainer.model.peft_config["default"]) else 4)
    assert not changes_base(saved)
    merge_run(tmp_path / "saved")
    merged = type(tiny_llama(VOCAB)).from_pretrained(tmp_path / "saved" / "merged")
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=2e-4)


def test_corda(run, tiny_llama, tmp_path):
    settings = lora("corda")
    settings.target_modules = ["q_proj", "v_proj", "down_proj"]
    base = type(tiny_llama(VOCAB)).from_pretrained(tmp_path / "base")
    for name, layer in base.named_modules():
        if name.endswith(tuple(settings.target_modules)):  # what peft's preprocess_corda leaves there, without weights
            u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            layer.eigens = SimpleNamespace(U_WC=u[:, :4], S_WC=s[:4].clone(), V_WC=vh[:4].T)
    trainer = run(settings, model=base)
    trainer.save_model(str(tmp_path / "saved"))
    after = logits(reloaded(tmp_path / "saved", tiny_llama, tmp_path))
    torch.testing.assert_close(after, logits(trainer.model), rtol=0, atol=2e-4)


def test_lora_ga(run, tiny_llama, tmp_path):
    """At loading, without gradients, peft leaves the base as it is."""
    from peft import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    settings = lora("lora_ga", lora_ga_config=LoraGAConfig())
    settings.target_modules = {"q_proj", "v_proj", "down_proj"}
    base = type(tiny_llama(VOCAB)).from_pretrained(tmp_path / "base")
    preprocess_loraga(base, settings, train_step=lambda: base(input_ids=IDS, labels=IDS).loss.backward())
    trainer = run(settings, model=base, learning_rate=0.01)
    trainer.save_model(str(tmp_path / "saved"))
    after = logits(reloaded(tmp_path / "saved", tiny_llama, tmp_path))
    torch.testing.assert_close(after, logits(trainer.model), rtol=0, atol=1e-3)


@pytest.mark.parametrize("drawn_again", [False, True])
def test_resuming(drawn_again, run, tiny_llama, tmp_path, caplog):
    checkpoints = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = run(lora("pissa_niter_2"), folder="whole", **checkpoints)
    given = None
    if drawn_again:  # as on another machine
        torch.manual_seed(99)
        base = type(tiny_llama(VOCAB)).from_pretrained(tmp_path / "base")
        given = get_peft_model(base, lora("pissa_niter_2"))
    first = tmp_path / "whole" / "checkpoint-1"
    resumed = run(
        None if drawn_again else lora("pissa_niter_2"),
        model=given,
        resume=str(first),
        folder="whole",
        allow_changed=True,
        **checkpoints,
    )
    assert ("the base is changed to fit" in caplog.text) == drawn_again
    tolerance = 2e-4 if drawn_again else 0
    torch.testing.assert_close(logits(resumed.model), logits(whole.model), rtol=0, atol=tolerance)
    resumed.save_model(str(tmp_path / "saved"))
    after = logits(reloaded(tmp_path / "saved", tiny_llama, tmp_path))
    torch.testing.assert_close(after, logits(whole.model), rtol=0, atol=4e-4)


def test_a_given_adapter_is_named(run, tiny_llama, tmp_path, caplog):
    base = type(tiny_llama(VOCAB)).from_pretrained(tmp_path / "base")
    trainer = run(None, model=get_peft_model(base, lora("olora")))
    assert "its weights at this moment are taken as its initial ones" in caplog.text
    trainer.save_model(str(tmp_path / "saved"))
    after = logits(reloaded(tmp_path / "saved", tiny_llama, tmp_path))
    torch.testing.assert_close(after, logits(trainer.model), rtol=0, atol=2e-4)


def test_what_cannot_be_saved_is_refused(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="loftq replaces the base's weights"):
        refuse_unsaveable(lora("loftq", loftq_config={"loftq_bits": 4}), quantised=False)
    with pytest.raises(UserError, match="olora would quantise the base a second time"):
        refuse_unsaveable(lora("olora"), quantised=True)
    refuse_unsaveable(lora(True), quantised=True)


def test_an_adapter_that_would_be_drawn_again_is_not_continued(tiny_llama, tmp_path):
    model = tiny_llama(VOCAB)
    get_peft_model(copy.deepcopy(model), lora("pissa_niter_2")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="init_lora_weights=pissa_niter_2"):
        add_adapter(model, adapter_name_or_path=str(tmp_path))
