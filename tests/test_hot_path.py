"""The hot path trains where datasets, trl, deepspeed, bitsandbytes and a network are missing."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import builtins, socket, sys
from importlib.abc import MetaPathFinder

MISSING = ("datasets", "trl", "deepspeed", "bitsandbytes")

class Nowhere(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Nowhere())
import importlib.util
really = importlib.util.find_spec

def find_spec(name, package=None):
    return None if name.split(".")[0] in MISSING else really(name, package)

importlib.util.find_spec = find_spec

def no_network(*args, **kwargs):
    raise OSError("no network")

socket.socket.connect = no_network
socket.create_connection = no_network

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_dist import ORPOConfig, ORPOTrainer

backend = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "</s>": 2}, unk_token="<pad>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<pad>")
rows = [{"prompt_ids": [3, 4, 5 + i], "chosen_ids": [6, 7, 2], "rejected_ids": [8, 2]} for i in range(8)]
for peft_config in (None, LoraConfig(r=2, target_modules="all-linear")):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))
    args = ORPOConfig(
        sys.argv[1], use_cpu=True, report_to="none", per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=2, logging_steps=1, save_strategy="steps", save_steps=2, learning_rate=1e-2, max_length=64,
    )
    trainer = ORPOTrainer(
        model, args, train_dataset=rows, eval_dataset=rows[:3], processing_class=tokenizer, peft_config=peft_config
    )
    trainer.train()
    figures = trainer.evaluate()
    assert trainer.layout.is_packed and figures["eval_loss"] > 0, figures
    assert not any(name.split(".")[0] in MISSING for name in sys.modules)
print("trained")
"""


def test_trains_without_them(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip().endswith("trained"), done.stderr[-3000:]
