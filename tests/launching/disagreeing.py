"""Two ranks that see different things at each place where all must decide alike. Each case returns one fact per rank.

torchrun --nproc_per_node 2 -m tests.launching.disagreeing SETTINGS.json OUT
"""

import json
import logging
import sys
import time
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_dist import ORPOConfig, ORPOTrainer
from orpo_dist.distributed.agree import as_on_first_rank, first_objection
from orpo_dist.distributed.once import done_by_first_rank
from orpo_dist.distributed.ranks import leave_together, on_first_rank
from orpo_dist.distributed.together import Together, background_group
from orpo_dist.training.deferred_writes import DeferredWrites

OUTLIER = {"prompt_ids": [50, 61, 72], "chosen_ids": [83, 94, 55], "rejected_ids": [33, 34, 35]}
USUAL = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 11, 2]}


class Worker:
    def __init__(self, settings: dict, out: Path):
        self.settings, self.out = settings, out
        self.logged = Lines()
        logging.getLogger("orpo_dist").addHandler(self.logged)

    def trainer(self, name: str, spoil=lambda model: None, rows=None, **changes) -> ORPOTrainer:
        config = {**self.settings["config"], **changes}
        args = ORPOConfig(output_dir=f"{self.out}.{name}", **config)
        model = AutoModelForCausalLM.from_pretrained(self.settings["model"], dtype=torch.float32)
        if args.process_index == 1:
            spoil(model)
        tokenizer = AutoTokenizer.from_pretrained(self.settings["tokenizer"])
        return ORPOTrainer(model, args, train_dataset=rows or [USUAL] * 8, processing_class=tokenizer)

    def an_objection(self) -> list:
        rank = distributed.get_rank()
        return [first_objection(""), first_objection("no" if rank else ""), first_objection(f"no {rank}")]

    def a_value(self) -> int:
        return as_on_first_rank(10 + distributed.get_rank())

    def an_error_of_the_first_rank(self) -> str:
        return outcome(lambda: on_first_rank(lambda: 1 / 0))

    def a_step_together(self) -> list:
        rank, ranks = distributed.get_rank(), Together(background_group())
        return [
            ranks.each(lambda: rank),
            ranks.first(lambda: f"of {rank}"),
            outcome(lambda: ranks.each(lambda: 1 / (1 - rank))),
            ranks.each(lambda: 10 + rank),
        ]

    def a_checkpoint_that_one_rank_cannot_write(self) -> list:
        """In the background, at the second step of eight."""
        write, saves = DeferredWrites.write, []

        def full(deferred: DeferredWrites) -> None:
            saves.append(None)
            if len(saves) == 2 and distributed.get_rank() == 1:
                raise OSError(28, "No space left on device")
            write(deferred)

        DeferredWrites.write = full
        trainer = self.trainer("full", save_strategy="steps", save_steps=1, async_save=True, max_steps=8)
        told = outcome(trainer.train)
        DeferredWrites.write = write
        names = sorted(path.name for path in Path(f"{self.out}.full").glob("checkpoint-*"))
        return [told, trainer.state.global_step, names]

    def a_long_last_act(self) -> str:
        return outcome(lambda: done_by_first_rank(lambda: time.sleep(1.5)))

    def a_last_act_that_fails(self) -> str:
        return outcome(lambda: done_by_first_rank(lambda: 1 / 0))

    def a_model_that_one_rank_cannot_pack(self) -> list:
        def spoil(model):
            model.config.attention_chunk_size = 1

        return self._run("unpackable", spoil)

    def a_check_that_fails_on_one_rank(self) -> list:
        def spoil(model):
            def shifted(module, args, kwargs, result):
                if "orpo_layout" in kwargs:
                    result.last_hidden_state.add_(1.0)
                return result

            model.model.register_forward_hook(shifted, with_kwargs=True)

        return self._run("unchecked", spoil)

    def a_spike_in_a_step_with_a_filler(self) -> list:
        """The last step of an epoch has one pair for two ranks, and it is the outlier."""
        order = torch.randperm(41, generator=torch.Generator().manual_seed(42)).tolist()
        rows = [OUTLIER if index == order[-1] else USUAL for index in range(41)]
        changes = {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 1,
            "learning_rate": 0.03,
            "optim": "adamw_torch",
        }
        return self._run("spike", rows=rows, **changes)

    def _run(self, name: str, spoil=lambda model: None, rows=None, **changes) -> list:
        self.logged.lines.clear()
        trainer = self.trainer(name, spoil, rows, **changes)
        trainer.train()
        weights = sum(parameter.double().sum().item() for parameter in trainer.model.parameters())
        return [trainer.layout.is_packed, trainer.state.global_step, weights, self.logged.lines[:]]


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def outcome(work) -> str:
    began = time.monotonic()
    try:
        work()
        return f"done after {time.monotonic() - began:.1f} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    settings, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    worker = Worker(settings, out)
    ORPOConfig(output_dir=str(out), use_cpu=True, report_to="none")  # starts the process group
    facts: dict[str, list] = {}
    for case in settings["cases"]:
        seen: list = [None, None]
        distributed.all_gather_object(seen, getattr(worker, case)())
        facts[case] = seen
    if distributed.get_rank() == 0:
        out.write_text(json.dumps({"log": [], "facts": facts}))
    leave_together()


if __name__ == "__main__":
    main()
