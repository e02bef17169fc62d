"""The loss head of padded rows: a model whose logits it cannot compute trains from full logits; one line says why."""

import logging

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from orpo_dist.loss import Objective, orpo_loss
from orpo_dist.model.forward import PairForward
from orpo_dist.model.packed.asked_layout import LayoutOptions
from orpo_dist.model.packed.choose_layout import LayoutChoice
from orpo_dist.packing.padded import score_padded
from tests.trainer_runs import pairs

ROWS = [{**row, "weight": 1.0, "index": index} for index, row in enumerate(pairs(3, 60))]
OBJECTIVE = Objective(beta=0.5)
CONFIG = dict(
    vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip


class Plain(LlamaForCausalLM):
    """Its parts as a subclass may compute them."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, inputs_embeds=None,
                past_key_values=None, **kwargs):  # fmt: skip
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False,
            inputs_embeds=inputs_embeds, past_key_values=past_key_values, **kwargs,
        ).last_hidden_state  # fmt: skip
        return CausalLMOutputWithPast(logits=self.logits(hidden))

    def logits(self, hidden):
        return self.lm_head(hidden)


class Normed(nn.Linear):
    """As Baichuan's NormHead, but a linear layer by its class."""

    def forward(self, x):
        return F.linear(x, F.normalize(self.weight))


class NormedHead(Plain):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = Normed(16, 60, bias=False)


class RowBias(Plain):
    """Logits that depend on more than the output layer's."""

    def logits(self, hidden):
        return self.lm_head(hidden) + hidden.mean(-1, keepdim=True) * F.one_hot(torch.tensor(5), 60)


class InPlace(Plain):
    """Writes into logits of the shape of its rows."""

    def logits(self, hidden):
        logits = self.lm_head(hidden)
        logits[..., 5] += hidden.mean(-1)
        return logits


class TokenBias(Plain):
    def logits(self, hidden):
        return self.lm_head(hidden) + 0.1 * torch.arange(60)


class TwoCalls(Plain):
    """Multi-token prediction: the output layer once more, for the token after the next."""

    def logits(self, hidden):
        logits = self.lm_head(hidden)
        self.lm_head(hidden.roll(1, 1))
        return logits


class NoCall(Plain):
    def logits(self, hidden):
        return F.linear(hidden, self.lm_head.weight)


class OtherRows(Plain):
    """The output layer is given a token of its own in front of each row."""

    def logits(self, hidden):
        return self.lm_head(torch.cat([hidden[:, :1], hidden], 1))[:, -hidden.shape[1] :]


class NoHead(Plain):
    def get_output_embeddings(self):
        return None


class OddLayer(Plain):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 60))


ODD = {
    NormedHead: "its logits and those of its output layer alone differ by",
    RowBias: "the model changes its logits by more than a factor and a softcap",
    InPlace: "its forward fails without its logits (",
    TokenBias: "the model changes its logits by more than a factor and a softcap",
    TwoCalls: "its forward calls its output layer 2 times",
    NoCall: "its forward calls its output layer 0 times",
    OtherRows: "the output layer is given",
    NoHead: "NoHead has no output layer that its forward calls",
    OddLayer: "the output layer is a Sequential, not a linear layer or LoRA on one",
}


def built(model_class):
    torch.manual_seed(0)
    model = model_class(LlamaConfig(**CONFIG)).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


def chosen(model, **changes):
    options = dict(
        objective=OBJECTIVE, padding_free=False, prefix_sharing=False, verify_layout=True, loss_chunk_size=None,
        nll_scope="sequence", pad_token_id=0, max_length=None, compute_dtype=torch.float32,
    )  # fmt: skip
    layout = LayoutChoice(LayoutOptions(**{**options, **changes}))
    layout.choose(model, router_aux_loss_coef=0.0)
    layout.verify(model)
    return layout


def losses(model, layout):
    """Of the product, and of full logits."""
    batch = layout.collator(ROWS)
    made = batch["orpo_layout"]
    made.tokens, made.pairs = made.counts().unbind()
    ours = PairForward(layout, OBJECTIVE)(model, dict(batch), torch.device("cpu")).loss
    del batch["orpo_layout"]
    theirs = orpo_loss(score_padded(model(**batch, use_cache=False).logits, made), OBJECTIVE, made.tokens, made.pairs)
    return ours, theirs


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("model_class", ODD)
def test_logits_that_the_head_does_not_compute_are_formed(model_class, padding_free, caplog):
    caplog.set_level(logging.WARNING, "orpo_dist")
    model = built(model_class)
    layout = chosen(model, padding_free=padding_free)
    said = [record.getMessage() for record in caplog.records if ODD[model_class] in record.getMessage()]
    begin = "Padded layout with full logits: " if padding_free or model_class is NoHead else "Full logits: "
    assert len(said) == 1 and said[0].startswith(begin)
    assert not layout.is_packed and "forward" not in vars(model)
    ours, theirs = losses(model, layout)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    ours.backward()


@pytest.mark.parametrize("model_class", [TokenBias, TwoCalls, NormedHead])
def test_the_head_of_padded_rows_is_checked_without_verify_layout_too(model_class, caplog):
    model = built(model_class)
    layout = chosen(model, verify_layout=False)
    ours, theirs = losses(model, layout)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    assert ODD[model_class] in caplog.text


def test_an_adapter_that_the_head_does_not_compute(caplog):
    model = get_peft_model(built(Plain), LoraConfig(target_modules=["lm_head"], use_dora=True))
    layout = chosen(model)
    assert "Full logits: the output layer's adapter is not plain LoRA (DoRA, lora_bias)." in caplog.text
    ours, theirs = losses(model, layout)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_prefix_tuning_keeps_the_head(caplog):
    model = get_peft_model(built(Plain), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).double()
    layout = chosen(model, padding_free=True)
    assert "prefix tuning" in caplog.text and "ull logits" not in caplog.text
    ours, theirs = losses(model, layout)
    assert layout.scores_by_head(layout.collator(ROWS)["orpo_layout"])
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)


def test_a_plain_model_is_as_it_came_after_the_check():
    model = built(Plain)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen(model)
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    assert not model.lm_head._forward_pre_hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_evaluation_never_runs_packed_on_a_head_that_is_wrong():
    from orpo_dist.errors import UserError

    model = built(NormedHead)
    options = LayoutOptions(
        objective=OBJECTIVE, padding_free=True, prefix_sharing=False, verify_layout=True, loss_chunk_size=None,
        nll_scope="sequence", pad_token_id=0, max_length=None, compute_dtype=torch.float32,
    )  # fmt: skip
    layout = LayoutChoice(options)
    layout.choose(model, router_aux_loss_coef=0.0)
    with pytest.raises(UserError, match="Set padding_free=false"):
        layout.verify(model, may_fall_back=False)
