"""One rank of a topology test with images; see worker.py. Only every eighth pair has images, so that at each micro-step
at least one of two ranks has none.

python -m tests.launching.vlm_worker SETTINGS.json OUT, or below torchrun or accelerate launch.
"""

import json
import os
import sys
from pathlib import Path

import torch

import tests.torchvision_ops  # noqa: F401  (before transformers)
from tests.launching import fsdp_on_cpu

if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
    fsdp_on_cpu.enable()

from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig

from orpo_dist import ORPOConfig, ORPOTrainer
from orpo_dist.distributed.ranks import leave_together
from orpo_dist.model.loading.load import load_model
from tests.model.tiny_vlms import drawing, image_row, tiny_processor

WORDS = ("quick brown fox", "the lazy dog", "near the river bank", "open the settings", "Paris", "seven eight nine ten")


def rows(family: str, count: int) -> list[dict]:
    made = []
    for i in range(count):
        images = [drawing(24 + i, 20, i), drawing(16, 24 + i, i + 1)][: 1 + i // 8 % 2] if i % 8 == 3 else []
        question = " ".join(WORDS[(i + k) % 6] for k in range(1 + i % 4))
        made.append(image_row(family, i, images, question, WORDS[i % 6], f"{WORDS[(i + 2) % 6]} {WORDS[i % 5]}"))
    return made


def main() -> None:
    settings, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    config = ORPOConfig(output_dir=str(out) + ".run", **settings["config"])
    family = settings["family"]
    quantization = None
    if settings.get("load_in_4bit"):
        dtype = torch.float32
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        )
    model = load_model(settings["model"], quantization_config=quantization)
    trainer = ORPOTrainer(
        model,
        config,
        train_dataset=rows(family, 24),
        eval_dataset=rows(family, 7),
        processing_class=tiny_processor(family),
        peft_config=LoraConfig(**settings["lora"]) if "lora" in settings else None,
    )
    trainer.train()
    linear4 = {name for name, module in trainer.model.named_modules() if type(module).__name__ == "Linear4bit"}
    facts = {
        "distributed_type": str(trainer.accelerator.distributed_type),
        "world_size": trainer.args.world_size,
        "zero_stage": trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None,
        "sharded_parameters": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "partitioned_parameters": sum(hasattr(p, "ds_tensor") for p in trainer.model.parameters()),
        "quantized_layers": len(linear4),
        "quantized_in_vision": sum("language_model" not in name for name in linear4),
        "packed": trainer.layout.is_packed,
        "has_filler": trainer.layout.collator.chosen.filler is not None,
    }
    trainer.save_model(str(out) + ".saved")
    if trainer.accelerator.is_main_process:
        out.write_text(json.dumps({"log": trainer.state.log_history, "facts": facts}))
    leave_together()


if __name__ == "__main__":
    main()
