"""The trainer's overhead over forward and backward alone, and how evenly work is spread over the ranks.

    python benchmarks/overhead.py              (CPU, about 5 minutes; writes results/overhead.json and overhead.md)

- A training step without the optimizer (collation, totals of the global batch, forward, backward, metrics) relative to
  forward and backward alone on the same packed batch, alternating in one process; medians.
- Time to plan one global batch of 4096 pairs for 64 ranks.
- Balance: sum of mean / sum of max of the ranks' cost over the micro-steps of ten epochs, lengths as in bench.py.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench import HERE, SMOLLM2, commit, processor, read_lengths, stratified
from transformers import AutoConfig, AutoModelForCausalLM, logging
from worker import rows_of, words

from orpo_dist import ORPOConfig, ORPOTrainer
from orpo_dist.packing.lengths import PairLengths, pair_costs
from orpo_dist.packing.sampler import GlobalBatchSampler

BALANCE = ((8, 4, 1), (64, 4, 1), (8, 1, 8))  # ranks, pairs per micro-batch, accumulation
PLANNED_PAIRS, PLANNED_RANKS = 4096, 64


def costs(lengths: list[list[int]], repeats: int) -> list[float]:
    return pair_costs([PairLengths(*row) for row in lengths], SMOLLM2["hidden_size"]) * repeats


def balance(lengths: list[list[int]], ranks: int, per_device: int, accumulation: int) -> float:
    of_pair = costs(lengths, repeats=10)
    sampler = GlobalBatchSampler(
        of_pair,
        global_batch=ranks * per_device * accumulation,
        accumulation=accumulation,
        data_ranks=ranks,
        data_rank=0,
        seed=0,
        drop_last=True,
    )
    mean = most = 0.0
    for batch in sampler.global_batches():
        for micro_step in sampler.plan(batch):
            loads = [sum(of_pair[i] for i in bin_of_pairs) for bin_of_pairs in micro_step]
            mean += sum(loads) / ranks
            most += max(loads)
    return mean / most


def planning_milliseconds(lengths: list[list[int]], repeats: int) -> list[float]:
    sampler = GlobalBatchSampler(
        costs(lengths, repeats=PLANNED_PAIRS // len(lengths) + 1)[:PLANNED_PAIRS],
        global_batch=PLANNED_PAIRS,
        accumulation=16,
        data_ranks=PLANNED_RANKS,
        data_rank=0,
        seed=0,
    )
    batch = next(sampler.global_batches())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        sampler.plan(batch)
        times.append(1000 * (time.perf_counter() - start))
    return times


def step_seconds(lengths: list[list[int]], batch: int, repeats: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMOLLM2), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ORPOTrainer(
            model,
            ORPOConfig(folder, per_device_train_batch_size=batch, use_cpu=True, report_to="none", max_length=None),
            train_dataset=rows_of(lengths, model.config.vocab_size),
            processing_class=words(),
        )
        model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.current_gradient_accumulation_steps = 1
        batches = stratified(lengths, 1, batch)

        def trained() -> None:
            loader = iter(trainer.loaders.of(trainer.train_dataset, batches))
            (inputs,), tokens = trainer.get_batch_samples(loader, 1, trainer.args.device)
            trainer.training_step(model, inputs, tokens)

        prepared = next(iter(trainer.loaders.of(trainer.train_dataset, batches)))
        layout = prepared["orpo_layout"]
        layout.tokens, layout.pairs = layout.counts().float().unbind()
        model.train()

        def bare() -> None:
            model(**prepared, use_cache=False).backward()

        seconds: dict[str, list[float]] = {"step": [], "bare": []}
        for number in range(repeats + 1):
            for name, run in (("step", trained), ("bare", bare)):
                model.zero_grad()
                gc.collect()
                start = time.perf_counter()
                run()
                if number:  # the first of each is a warm-up
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", default="real")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    revision = commit()  # before the results make the tree dirty
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    lengths = read_lengths(options.lengths)
    evenness = {
        f"{ranks} ranks x {per} x accumulation {accumulation}": balance(lengths, ranks, per, accumulation)
        for ranks, per, accumulation in BALANCE
    }
    planning = planning_milliseconds(lengths, repeats=20)
    seconds = step_seconds(lengths, options.batch, options.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        f"SmolLM2-135M's shape, {options.batch} pairs of real lengths, CPU, {options.threads} threads of "
        f"{processor()}, commit {revision}.\n",
        "| | |",
        "|---|---|",
        f"| bare forward and backward of a packed batch | {medians['bare']:.2f} s |",
        f"| training step without the optimizer, same batch | {medians['step']:.2f} s |",
        f"| ratio | {medians['step'] / medians['bare']:.3f} |",
        f"| planning {PLANNED_PAIRS} pairs for {PLANNED_RANKS} ranks | {statistics.median(planning):.1f} ms |",
        *(f"| balance, {name} | {value:.3f} |" for name, value in evenness.items()),
    ]
    print("\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overhead.md").write_text("\n".join(lines) + "\n")
    figures = {"commit": revision, "balance": evenness, "planning_milliseconds": planning, "seconds": seconds}
    (options.out / "overhead.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
