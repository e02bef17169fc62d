"""Ours against TRL's ORPOTrainer, and against ours without sharing and ours padded: pairs per second, memory, FLOPs.

    make bench-quick                                     CPU, under 15 minutes
    make bench                                           CPU, under 60 minutes
    python benchmarks/bench.py --device cuda --batch 8   one GPU

Every measurement is a process of its own; the trainers take turns within a round, and the table gives medians and
their ratios. Lengths come from a file of [P, C, R] triples (benchmarks/lengths/); the ids are random, since nothing
here depends on them. The weights are random too, of the named model's shape.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
TRAINERS = ("trl", "padded", "unshared", "packed")
SMOLLM2 = dict(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Case:
    name: str
    lengths: str
    lora: bool
    batches: int


QUICK = (Case("real lengths, full", "real", False, 2),)
FULL = (
    Case("real lengths, full", "real", False, 6),
    Case("real lengths, LoRA", "real", True, 6),
    Case("short prompts, full", "short", False, 6),
)


def stratified(lengths: list[list[int]], batches: int, size: int) -> list[list[int]]:
    """`batches` lists of `size` rows: in each, one from every quantile of length, as a shuffled epoch has them."""
    order = sorted(range(len(lengths)), key=lambda i: sum(lengths[i]))
    wanted = batches * size
    picked = [order[int((k + 0.5) * len(order) / wanted)] for k in range(wanted)]
    return [picked[b::batches] for b in range(batches)]


def measure(settings: dict) -> dict:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(settings))
        file.flush()
        done = subprocess.run(
            [sys.executable, str(HERE / "worker.py"), file.name],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{settings['trainer']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_case(case: Case, options: argparse.Namespace) -> dict:
    lengths = json.loads((HERE / "lengths" / f"{case.lengths}.json").read_text())
    settings = dict(
        model=SMOLLM2,
        lengths=lengths,
        batches=stratified(lengths, case.batches, options.batch),
        batch=options.batch,
        lora=case.lora,
        device=options.device,
        threads=options.threads,
        checkpointing=options.checkpointing,
        warmup=1,
    )
    rounds: dict[str, list[dict]] = {trainer: [] for trainer in TRAINERS}
    for number in range(options.rounds):
        for trainer in TRAINERS:
            figures = measure({**settings, "trainer": trainer, "count_flops": number == 0})
            rounds[trainer].append(figures)
            print(f"  round {number + 1} {trainer:9s} {figures['pairs_per_second']:.4f} pairs/s", flush=True)
    result = {}
    for trainer, measured in rounds.items():
        result[trainer] = {
            "pairs_per_second": statistics.median(m["pairs_per_second"] for m in measured),
            "peak_memory_gib": statistics.median(m["peak_memory_gib"] for m in measured),
            "flops": measured[0]["flops"],
            "rounds": measured,
        }
    return result


def table(case: Case, result: dict) -> str:
    base = result["trl"]
    lines = [f"\n**{case.name}**\n", "| | pairs/s | x TRL | peak memory, GiB | of TRL's | FLOPs of TRL's |"]
    lines.append("|---|---|---|---|---|---|")
    for trainer, row in result.items():
        speed = row["pairs_per_second"] / base["pairs_per_second"]
        memory = row["peak_memory_gib"] / base["peak_memory_gib"]
        lines.append(
            f"| {'TRL' if trainer == 'trl' else 'ours, ' + trainer} | {row['pairs_per_second']:.3f} | {speed:.2f} | "
            f"{row['peak_memory_gib']:.2f} | {memory:.2f} | {row['flops'] / base['flops']:.2f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, key, title in (
        (axes[0], "pairs_per_second", "pairs per second"),
        (axes[1], "peak_memory_gib", "peak memory, GiB"),
    ):
        for i, trainer in enumerate(TRAINERS):
            places = [place + 0.2 * i for place in range(len(results))]
            axis.bar(places, [result[trainer][key] for result in results.values()], width=0.18, label=trainer)
        axis.set_xticks([place + 0.3 for place in range(len(results))], list(results), fontsize=8)
        axis.set_title(title)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case, two batches")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=4, help="pairs per micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each process")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing, in all trainers")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    results = {}
    tables = []
    for case in QUICK if options.quick else FULL:
        print(case.name, flush=True)
        results[case.name] = run_case(case, options)
        tables.append(table(case, results[case.name]))
        print(tables[-1], flush=True)
    packages = ("torch", "transformers", "trl", "peft", "accelerate")
    about = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "versions": {name: version(name) for name in packages},
        "cases": [asdict(case) for case in (QUICK if options.quick else FULL)],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{options.device}{'-quick' if options.quick else ''}"
    (options.out / f"{name}.json").write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(
        f"SmolLM2-135M's shape, micro-batches of {options.batch} pairs, {options.device}, commit {about['commit']}, "
        f"versions {about['versions']}.\n" + "\n".join(tables) + "\n"
    )
    plot(results, options.out / f"{name}.png")


if __name__ == "__main__":
    main()
