import pytest
import torch
from peft import LoraConfig
from transformers import AwqConfig, BitsAndBytesConfig

from orpo_dist import ORPOTrainer
from orpo_dist.errors import UserError
from orpo_dist.model.loading.init_kwargs import model_init_kwargs
from tests.trainer_runs import config, pairs


def read(folder, **kwargs):
    return model_init_kwargs(config(folder, model_init_kwargs=kwargs))


@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16", torch.bfloat16])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_torch_dtype_is_dtype(tmp_path, name, value):
    assert read(tmp_path, **{name: value}) == {"dtype": torch.bfloat16}
    assert read(tmp_path, **{name: "auto"}) == {"dtype": "auto"}


def test_a_json_text_is_a_mapping(tmp_path):
    args = config(
        tmp_path, model_init_kwargs='{"torch_dtype": "float16", "quantization_config": {"load_in_8bit": true}}'
    )
    kwargs = model_init_kwargs(args)
    assert kwargs["dtype"] == torch.float16 and kwargs["quantization_config"].load_in_8bit


def test_a_mapping_is_a_quantisation_config(tmp_path):
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    for more in ({}, {"quant_method": "bitsandbytes"}):
        made = read(tmp_path, quantization_config=options | more)["quantization_config"]
        assert isinstance(made, BitsAndBytesConfig) and made.load_in_4bit
        assert (made.bnb_4bit_quant_type, made.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert read(tmp_path, quantization_config=made)["quantization_config"] is made
    saved = read(tmp_path, quantization_config=made.to_dict())["quantization_config"]
    assert saved.to_dict() == made.to_dict()
    other = read(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})["quantization_config"]
    assert isinstance(other, AwqConfig)


@pytest.mark.parametrize(
    "kwargs, named",
    [
        ({"load_in_4bit": True}, "load_in_4bit is an old argument.*quantization_config"),
        ({"use_flash_attention_2": True}, "use_flash_attention_2.*attn_implementation"),
        ({"dtype": "bfloat61"}, "bfloat61"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype=float32 and torch_dtype=bfloat16"),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}},
            "Did you mean 'bnb_4bit_quant_type'",
        ),
        ({"quantization_config": {"bnb_4bit_quant_type": "nf4"}}, "set load_in_4bit or load_in_8bit"),
        ({"quantization_config": {"quant_method": "none"}}, "quant_method to one of"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float61"}}, "float61"),
        ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}, "load_in_4bit and load_in_8bit"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, kwargs, named):
    with pytest.raises(UserError, match=f"model_init_kwargs.*{named}"):
        read(tmp_path, **kwargs)


@pytest.fixture
def folder(tmp_path, tiny_llama, chat_tokenizer):
    tiny_llama(len(chat_tokenizer)).save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def build(folder, tokenizer, tmp_path, peft_config=None, **kwargs):
    args = config(tmp_path / "run", max_steps=1, model_init_kwargs=kwargs)
    return ORPOTrainer(folder, args, train_dataset=pairs(4, len(tokenizer)), peft_config=peft_config)


def test_a_trainer_loads_the_model_as_asked(tmp_path, folder, chat_tokenizer):
    trainer = build(folder, chat_tokenizer, tmp_path, torch_dtype="bfloat16", trust_remote_code=False)
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="no argument 'load_in_3bit'"):
        build(folder, chat_tokenizer, tmp_path, load_in_3bit=True)


def test_a_quantisation_given_as_a_mapping_trains_an_adapter(tmp_path, folder, chat_tokenizer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantised = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    adapter = LoraConfig(r=2, target_modules="all-linear")
    trainer = build(folder, chat_tokenizer, tmp_path, adapter, quantization_config=quantised)
    trainer.train()
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in trainer.model.modules()) == 14
