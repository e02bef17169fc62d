"""One rank of a run of a subclass: an order that ranks would draw differently, a penalty, and noise on the embeddings.

python -m tests.launching.subclass_worker SETTINGS.json OUT, or below torchrun.
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_dist import ORPOConfig, ORPOTrainer
from orpo_dist.distributed.ranks import leave_together


class Subclass(ORPOTrainer):
    def _get_train_sampler(self, *args):
        random.seed(self.args.process_index)
        return random.sample(range(len(self.train_dataset)), k=len(self.train_dataset))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        weight = self.accelerator.unwrap_model(model).get_input_embeddings().weight
        return loss + 0.1 * weight.square().sum()


def main() -> None:
    settings, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    trainer = Subclass(
        AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
        ORPOConfig(output_dir=str(out) + ".run", **settings["config"]),
        train_dataset=settings["train"],
        processing_class=AutoTokenizer.from_pretrained(settings["tokenizer"]),
    )
    trainer.train()
    trainer.save_model(str(out) + ".saved")
    if trainer.accelerator.is_main_process:
        out.write_text(json.dumps({"log": trainer.state.log_history, "facts": {"world_size": trainer.args.world_size}}))
    leave_together()


if __name__ == "__main__":
    main()
