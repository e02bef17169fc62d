"""evaluate() before train(), and train() a second time: what each of them does.

accelerate launch ... -m tests.launching.evaluating_first SETTINGS.json OUT
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tests.launching import fsdp_on_cpu

if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
    fsdp_on_cpu.enable()

from transformers import AutoTokenizer

from orpo_dist import ORPOConfig, ORPOTrainer
from orpo_dist.distributed.ranks import leave_together


def outcome(work: Callable[[], object]) -> str:
    try:
        work()
        return "done"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    settings, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    trainer = ORPOTrainer(
        settings["model"],
        ORPOConfig(output_dir=f"{out}.run", **settings["config"]),
        train_dataset=settings["train"],
        eval_dataset=settings["eval"],
        processing_class=AutoTokenizer.from_pretrained(settings["tokenizer"]),
    )
    calls = {"evaluate": trainer.evaluate, "train": trainer.train}
    facts = {"outcomes": [outcome(calls[name]) for name in settings["calls"]]}
    if trainer.accelerator.is_main_process:
        out.write_text(json.dumps({"log": trainer.state.log_history, "facts": facts}))
    leave_together()


if __name__ == "__main__":
    main()
