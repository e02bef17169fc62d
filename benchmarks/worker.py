"""One measurement in its own process: `worker.py SETTINGS.json` prints one line of JSON.

Both trainers run their own `train()`: collation, forward, backward, gradient clipping, optimizer, schedule. Only the
loader is replaced, so that they get the same batches. Time is measured from the end of one optimizer step to the end of
the next; the first step (on the shortest pairs) initialises the optimizer state and is not counted.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback, logging


def rows_of(lengths: list[list[int]], vocabulary: int) -> list[dict[str, list[int]]]:
    """Pairs of random token ids with the given (P, C, R)."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(10, vocabulary, (n,), generator=generator).tolist()

    return [{"prompt_ids": ids(P), "chosen_ids": ids(C), "rejected_ids": ids(R)} for P, C, R in lengths]


def words() -> PreTrainedTokenizerFast:
    """A placeholder tokenizer: the rows are already token ids."""
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="b", unk_token="<pad>")


class StepTimes(TrainerCallback):
    """When each optimizer step ended, and the peak memory of all but the first."""

    def __init__(self, device: str):
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if self.device == "cuda":
            torch.cuda.synchronize()
            if not self.ends:
                torch.cuda.reset_peak_memory_stats()
        self.ends.append(time.perf_counter())


def arguments(settings: dict, folder: str) -> dict:
    on_gpu = settings["device"] == "cuda"
    return dict(
        output_dir=folder,
        per_device_train_batch_size=settings["batch"],
        max_steps=len(settings["batches"]),
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=settings["checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def our_trainer(settings: dict, model, folder: str, clock: StepTimes):
    from orpo_dist import ORPOConfig, ORPOTrainer

    class SameBatches(ORPOTrainer):
        def get_train_dataloader(self):
            return self.loaders.of(self.train_dataset, settings["batches"])

    layout = {"padded": dict(padding_free=False), "unshared": dict(prefix_sharing=False), "packed": {}}
    return SameBatches(
        model,
        ORPOConfig(**arguments(settings, folder), max_length=None, **layout[settings["trainer"]]),
        train_dataset=rows_of(settings["lengths"], model.config.vocab_size),
        processing_class=words(),
        callbacks=[clock],
    )


def trl_trainer(settings: dict, model, folder: str, clock: StepTimes):
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    features = []
    for row in rows_of(settings["lengths"], model.config.vocab_size):
        prompt = row["prompt_ids"]
        feature = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            completion = row[f"{side}_ids"]
            feature[f"{side}_input_ids"] = prompt + completion
            feature[f"{side}_attention_mask"] = [1] * (len(prompt) + len(completion))
            feature[f"{side}_labels"] = [-100] * len(prompt) + completion
        features.append(feature)

    class SameBatches(ORPOTrainer):
        def get_train_dataloader(self):
            loader = torch.utils.data.DataLoader(
                features, batch_sampler=settings["batches"], collate_fn=self.data_collator
            )
            return self.accelerator.prepare(loader)

    return SameBatches(
        model,
        ORPOConfig(**arguments(settings, folder), max_length=1_000_000, remove_unused_columns=False),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "a"}]),
        processing_class=words(),
        callbacks=[clock],
    )


def peak_memory_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def static_memory_gib(model: torch.nn.Module) -> float:
    """Weights, plus gradients and AdamW's two moments of the trained ones: memory that no layout can save."""
    held = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
    return held / 2**30


def flops_of_first_step(trainer) -> int:
    """By FlopCounterMode, which does not count the fused attention kernels on a CPU."""
    loader = iter(trainer.get_train_dataloader())
    next(loader)
    batches, tokens = trainer.get_batch_samples(loader, 1, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 1
    with FlopCounterMode(display=False) as counter:
        trainer.training_step(trainer.model_wrapped, batches[0], tokens)
    return counter.get_total_flops()


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    logging.set_verbosity_error()
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    device = settings["device"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings["model"]), dtype=torch.float32)
    if settings["lora"]:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    clock = StepTimes(device)
    with tempfile.TemporaryDirectory() as folder:
        make = trl_trainer if settings["trainer"] == "trl" else our_trainer
        trainer = make(settings, model, folder, clock)
        trainer.train()
        memory = peak_memory_gib(device)
        flops = flops_of_first_step(trainer) if settings["count_flops"] else None
    steps = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    pairs = sum(map(len, settings["batches"][1:]))
    figures = {
        "pairs_per_second": pairs / sum(steps),
        "seconds_per_step": steps,
        "peak_memory_gib": memory,
        "static_memory_gib": static_memory_gib(model),
        "loss": trainer.state.log_history[-1]["train_loss"],
        "flops": flops,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
