import pytest

from orpo_dist.errors import UserError
from orpo_dist.model.loading.wrapped_layers import refuse_unknown_layers


@pytest.fixture(params=["model", "folder"])
def model(request, tmp_path, tiny_llama):
    built = tiny_llama(64)
    if request.param == "model":
        return built
    built.config.save_pretrained(tmp_path)  # no weights: they are not looked at
    return str(tmp_path)


def test_a_layer_that_the_model_does_not_have_is_named(model, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    refuse_unknown_layers(model)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer,MistralDecoderLayer")
    with pytest.raises(UserError, match=r"names MistralDecoderLayer, and the model has no such layer. It has Llama"):
        refuse_unknown_layers(model)


def test_without_fsdp_the_variable_means_nothing(model, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "MistralDecoderLayer")
    refuse_unknown_layers(model)
