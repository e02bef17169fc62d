"""Packages that options need. This machine's are asked, except where a test hides one."""

import importlib.util

import pytest
from transformers import BitsAndBytesConfig
from transformers.training_args import OptimizerNames

from orpo_dist import ORPOTrainer
from orpo_dist.errors import UserError
from orpo_dist.training import packages
from orpo_dist.training.packages import OPTIMIZERS, quantization_asked, refuse_missing_packages
from tests.trainer_runs import config


@pytest.fixture
def hidden(monkeypatch):
    """Packages that are not installed, as far as find_spec is asked."""
    names: set[str] = set()
    real = importlib.util.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in names else real(name))
    return names


def test_every_optimizer_of_transformers_is_known():
    unknown = [n.value for n in OptimizerNames if not any(n.value.startswith(start) for start in OPTIMIZERS)]
    assert unknown == []


@pytest.mark.parametrize(
    ("optim", "package"),
    [
        ("adamw_bnb_8bit", "bitsandbytes"),
        ("adamw_8bit", "bitsandbytes"),
        ("paged_adamw_32bit", "bitsandbytes"),
        ("lion_32bit", "bitsandbytes"),
        ("ademamix", "bitsandbytes"),
        ("rmsprop_bnb", "bitsandbytes"),
        ("adamw_torch_8bit", "torchao"),
        ("galore_adamw", "galore_torch"),
        ("schedule_free_adamw", "schedulefree"),
    ],
)
def test_the_package_of_an_optimizer(hidden, optim, package):
    hidden.add(package)
    with pytest.raises(UserError, match=f"optim={optim} needs {package}, which is not installed: pip install"):
        refuse_missing_packages(optim)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_torchs_own_need_none(hidden, optim):
    hidden.update(need[0] for need in OPTIMIZERS.values() if need is not None)
    refuse_missing_packages(OptimizerNames(optim))


def test_attention_and_quantisation(hidden, monkeypatch):
    hidden.add("bitsandbytes")
    with pytest.raises(UserError, match="load_in_4bit needs bitsandbytes"):
        refuse_missing_packages("sgd", None, "load_in_4bit")
    monkeypatch.setattr(packages, "is_kernels_available", lambda: False)
    for kind in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(packages, kind, lambda: False)
    for number in (2, 3):
        with pytest.raises(UserError, match=f"attn_implementation=flash_attention_{number} needs flash-attn"):
            refuse_missing_packages("sgd", f"flash_attention_{number}")
    refuse_missing_packages("sgd", "sdpa")


@pytest.mark.parametrize(
    ("given", "asks"),
    [
        ({}, False),
        ({"quantization_config": {"load_in_4bit": True}}, True),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, True),
        ({"quantization_config": {"quant_method": "gptq"}}, False),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, True),
    ],
)
def test_who_asks_for_bitsandbytes(given, asks):
    assert quantization_asked(given) == ("quantization_config" if asks else None)


def test_it_is_found_before_the_rows_are_looked_at(tmp_path, hidden, tiny_llama, chat_tokenizer):
    hidden.add("bitsandbytes")
    rows = [{"not": "a pair"}]
    with pytest.raises(UserError, match="optim=paged_adamw_8bit needs bitsandbytes"):
        ORPOTrainer(
            tiny_llama(64),
            config(tmp_path, optim="paged_adamw_8bit"),
            train_dataset=rows,
            processing_class=chat_tokenizer,
        )
