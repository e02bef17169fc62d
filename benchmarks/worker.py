"""One measurement in a process of its own: `worker.py SETTINGS.json` prints one line of JSON.

A step is what a trainer does for one micro-batch of pairs: collate, forward, backward, optimizer.
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
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, logging

TRAINERS = ("trl", "padded", "unshared", "packed")


def rows_of(lengths: list[list[int]], vocabulary: int) -> list[dict[str, list[int]]]:
    """Pairs of random token ids with the given (P, C, R)."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(10, vocabulary, (n,), generator=generator).tolist()

    return [{"prompt_ids": ids(P), "chosen_ids": ids(C), "rejected_ids": ids(R)} for P, C, R in lengths]


def words() -> PreTrainedTokenizerFast:
    """Any tokenizer: the rows are token ids already."""
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="b", unk_token="<pad>")


def arguments(settings: dict, folder: str) -> dict:
    on_gpu = settings["device"] == "cuda"
    return dict(
        output_dir=folder,
        per_device_train_batch_size=settings["batch"],
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to="none",
        gradient_checkpointing=settings["checkpointing"],
        max_length=None if settings["trainer"] != "trl" else 1_000_000,
    )


def our_steps(settings: dict, model, folder: str):
    from orpo_dist import ORPOConfig, ORPOTrainer

    layout = {"padded": dict(padding_free=False), "unshared": dict(prefix_sharing=False), "packed": {}}
    trainer = ORPOTrainer(
        model,
        ORPOConfig(**arguments(settings, folder), **layout[settings["trainer"]]),
        train_dataset=rows_of(settings["lengths"], model.config.vocab_size),
        processing_class=words(),
    )
    trainer.forward.verify(trainer.model)
    loader = trainer._loader(trainer.train_dataset, settings["batches"])

    def steps():
        iterator = iter(loader)
        for _ in settings["batches"]:
            yield trainer.get_batch_samples(iterator, 1, trainer.args.device)[0][0]

    return trainer, steps


def trl_steps(settings: dict, model, folder: str):
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(
        model,
        ORPOConfig(**arguments(settings, folder), remove_unused_columns=False),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "a"}]),
        processing_class=words(),
    )
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

    def steps():
        for batch in settings["batches"]:
            yield trainer.data_collator([features[i] for i in batch])

    return trainer, steps


def peak_memory_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    logging.set_verbosity_error()
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    dtype = torch.bfloat16 if settings["device"] == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings["model"]), dtype=dtype)
    if settings["lora"]:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as folder:
        make = trl_steps if settings["trainer"] == "trl" else our_steps
        trainer, steps = make(settings, model, folder)
        if settings["checkpointing"]:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        device = settings["device"]
        model = trainer.accelerator.prepare(trainer.model)
        trainer.create_optimizer()
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        trainer.current_gradient_accumulation_steps = 1

        def step(batch) -> None:
            trainer.training_step(model, batch)
            trainer.optimizer.step()
            model.zero_grad()

        for batch in list(steps())[: settings["warmup"]]:
            step(batch)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for batch in steps():
            step(batch)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        memory = peak_memory_gib(device)
        flops = None
        if settings["count_flops"]:
            with FlopCounterMode(display=False) as counter:
                for batch in steps():
                    trainer.training_step(model, batch)
            flops = counter.get_total_flops()
    pairs = sum(map(len, settings["batches"]))
    print(json.dumps({"pairs_per_second": pairs / seconds, "peak_memory_gib": memory, "flops": flops}))


if __name__ == "__main__":
    main()
