import pytest
import torch
import transformers as t

from orpo_dist import ORPOTrainer
from orpo_dist.errors import UserError
from orpo_dist.model.routers import balancing_loss, router_aux_loss_coef
from tests.trainer_runs import config, pairs

SMALL = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, head_dim=8)


def gpt_oss(**more):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    options = dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.9, rope_parameters=rope)
    return t.GptOssForCausalLM(t.GptOssConfig(**{**SMALL, **options, **more}))


def llama4(**more):
    experts = dict(num_local_experts=2, intermediate_size_mlp=48, router_aux_loss_coef=0.001)
    return t.Llama4ForCausalLM(t.Llama4TextConfig(**SMALL, **experts, **more))


def test_unset_it_is_what_trl_does():
    assert router_aux_loss_coef(gpt_oss(), None) == 0.0
    assert router_aux_loss_coef(gpt_oss(output_router_logits=True), None) == 0.9


def test_given_it_holds_whatever_the_config_says():
    assert router_aux_loss_coef(gpt_oss(), 0.01) == 0.01
    assert router_aux_loss_coef(gpt_oss(output_router_logits=True), 0.0) == 0.0


def test_a_model_without_such_a_loss_is_named(caplog):
    with pytest.raises(UserError, match=r"router_aux_loss_coef=0\.5.*Llama4ForCausalLM"):
        router_aux_loss_coef(llama4(), 0.5)
    assert router_aux_loss_coef(llama4(output_router_logits=True), None) == 0.0
    assert "Llama4ForCausalLM" in caplog.text
    assert router_aux_loss_coef(llama4(), None) == 0.0


def test_a_forward_without_the_loss_is_an_error_and_no_product_with_none():
    outputs = gpt_oss()(torch.tensor([[1, 2, 3]]))
    with pytest.raises(UserError, match="router_aux_loss_coef"):
        balancing_loss(outputs)


@pytest.mark.parametrize("padding_free", [True, False])
def test_the_configs_coefficient_alone_changes_no_loss(tmp_path, chat_tokenizer, padding_free):
    """gpt_oss ships 0.9, and TRL leaves it out of the loss unless output_router_logits is set."""

    def loss(folder, **more):
        trainer = ORPOTrainer(
            gpt_oss(vocab_size=len(chat_tokenizer), **more),
            config(tmp_path / folder, max_steps=1, padding_free=padding_free, verify_layout=False),
            train_dataset=pairs(4, len(chat_tokenizer)),
            processing_class=chat_tokenizer,
        )
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    plain = loss("plain")
    assert plain == pytest.approx(loss("no_coefficient", router_aux_loss_coef=0.0), abs=1e-6)
    assert loss("asked", output_router_logits=True) > plain + 0.5
