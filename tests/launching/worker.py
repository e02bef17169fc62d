"""One rank of a topology test: trains from a JSON file of settings and writes down what happened.

python -m tests.launching.worker SETTINGS.json OUT, or below torchrun or accelerate launch.
"""

import json
import os
import sys
from pathlib import Path

import torch

from tests.launching import collectives, fsdp_on_cpu

if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
    fsdp_on_cpu.enable()

from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from orpo_dist import ORPOConfig, ORPOTrainer
from orpo_dist.distributed.ranks import leave_together


def main() -> None:
    settings, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    config = ORPOConfig(output_dir=str(out) + ".run", **settings["config"])
    quantization = None
    if settings.get("load_in_4bit"):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, quantization_config=quantization
    )
    if "vocabulary" in settings:  # of the tokenizer with new tokens
        model.resize_token_embeddings(settings["vocabulary"], mean_resizing=False)
    peft_config = LoraConfig(**settings["lora"]) if "lora" in settings else None
    trainer = ORPOTrainer(
        model,
        config,
        train_dataset=settings["train"],
        eval_dataset=settings.get("eval"),
        processing_class=AutoTokenizer.from_pretrained(settings["tokenizer"]),
        peft_config=peft_config,
    )
    asked = collectives.count() if settings.get("count_collectives") else {}
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    facts = {
        "distributed_type": str(trainer.accelerator.distributed_type),
        "world_size": trainer.args.world_size,
        "zero_stage": trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None,
        "sharded_parameters": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "partitioned_parameters": sum(hasattr(p, "ds_tensor") for p in trainer.model.parameters()),
        "collectives": dict(asked),
        "is_packed": trainer.layout.is_packed,
        "quantized_layers": sum(type(m).__name__ == "Linear4bit" for m in trainer.model.modules()),
    }
    trainer.save_model(str(out) + ".saved")
    if trainer.accelerator.is_main_process:
        out.write_text(json.dumps({"log": trainer.state.log_history, "facts": facts}))
    leave_together()


if __name__ == "__main__":
    main()
