"""Saving a checkpoint: seconds that training stands still, with and without `async_save`, and what checksums cost.

    python benchmarks/checkpoint_saving.py [--rounds 5] [--out benchmarks/results/checkpoint_saving.json]

One process, a model of SmolLM2-135M's shape in float32 with AdamW's state: 1.5 GiB. After a step, checkpoints are saved
in turn: as usual, as usual without checksums of files beyond 16 MiB, and with `async_save`, which is waited for outside
of the measurement. Medians. Checksums alone are measured on the files of the last checkpoint, which are in the page
cache, as they are after a save. The folder is on the disk of --folder.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench import SMOLLM2, commit, processor
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from worker import words

from orpo_dist import ORPOConfig, ORPOTrainer
from orpo_dist.run import checkpoint as checkpoints
from orpo_dist.run.checksums import checksums
from orpo_dist.training import checkpoint_writer

SMALL = 16 * 2**20


def without_large(folder: Path, names: list[str]) -> dict[str, str]:
    """As before: no checksum of large files."""
    small = [name for name in names if (folder / name).stat().st_size <= SMALL]
    return {name: "" for name in names} | checksums(folder, small)


class Measure(TrainerCallback):
    """Saves in all ways, `rounds` times, after the first step."""

    def __init__(self, rounds: int):
        self.rounds, self.trainer = rounds, None
        self.seconds: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        for number in range(self.rounds + 1):  # the first of each way is a line of its own
            first = " (first)" if number == 0 else ""
            for way in ("sync", "sync, without checksums", "async"):
                trainer.args.async_save = way == "async"
                checkpoint_writer.checksums = without_large if "without" in way else checksums
                began = time.perf_counter()
                trainer._save_checkpoint(trainer.model_wrapped, None)
                self.add(way + first, time.perf_counter() - began)
                trainer._checkpoints.background.wait()
                if way == "async":
                    self.add("async, until it is there" + first, time.perf_counter() - began)
        folder = checkpoints.checkpoint_folders(Path(args.output_dir))[-1]
        sizes = checkpoints.sizes(folder)
        self.gib = sum(sizes.values()) / 2**30
        for _ in range(self.rounds):
            began, worked = time.perf_counter(), time.process_time()
            checksums(folder, list(sizes))
            self.add("checksums", time.perf_counter() - began)
            self.add("checksums, of the processors", time.process_time() - worked)
        control.should_training_stop = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where checkpoints are written; default: the system's temporary folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    measure = Measure(options.rounds)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        trainer = ORPOTrainer(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMOLLM2), dtype=torch.float32),
            ORPOConfig(
                folder,
                max_steps=2,
                per_device_train_batch_size=1,
                save_strategy="no",
                save_total_limit=1,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=[{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9, 10]}] * 2,
            processing_class=words(),
            callbacks=[measure],
        )
        measure.trainer = trainer
        trainer.train()
    medians = {name: round(statistics.median(values), 3) for name, values in measure.seconds.items()}
    result = {
        "commit": commit(),
        "gib": round(measure.gib, 3),
        "processor": processor(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "seconds": medians,
        "all": {name: [round(value, 3) for value in values] for name, values in measure.seconds.items()},
        "stall_of_async": round(medians["async"] / medians["sync"], 3),
        "checksums_gib_per_second": round(measure.gib / medians["checksums"], 2),
        "checksums_gib_per_processor_second": round(measure.gib / medians["checksums, of the processors"], 2),
        "checksums_add": round(medians["sync"] - medians["sync, without checksums"], 3),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
