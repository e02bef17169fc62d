"""The model and pairs of these tests, and what one process makes of them."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.topologies.runs import GENTLE, LORA, pairs, run


@pytest.fixture(scope="module")
def setting(tmp_path_factory, chat_tokenizer, tiny_llama):
    folder = tmp_path_factory.mktemp("topologies")
    tiny_llama(len(chat_tokenizer)).save_pretrained(folder / "model")
    torch.manual_seed(0)
    wide = LlamaConfig(**{**tiny_llama(len(chat_tokenizer)).config.to_dict(), "hidden_size": 64, "head_dim": 16})
    LlamaForCausalLM(wide).save_pretrained(folder / "wide")  # bitsandbytes quantises blocks of 64 weights
    chat_tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "folder": folder,
        "model": str(folder / "model"),
        "tokenizer": str(folder / "tokenizer"),
        "train": pairs(60, len(chat_tokenizer), seed=0),  # 8 steps: an epoch of 7 full batches and one of 4 pairs
        "eval": pairs(7, len(chat_tokenizer), seed=1),
    }


@pytest.fixture(scope="module")
def lora_reference(setting):
    return run(setting, "one_lora", GENTLE, lora=LORA)
