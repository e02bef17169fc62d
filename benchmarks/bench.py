"""This trainer against TRL's ORPOTrainer, with and without prompt sharing, and padded: pairs per second, memory, FLOPs.

    make bench-quick                                       CPU, under 15 minutes
    make bench                                             CPU, under 60 minutes
    python benchmarks/bench.py --device cuda --batch 8     one GPU
    python benchmarks/bench.py --lengths mine.json         your own data's lengths, see benchmarks/lengths.py

Every measurement runs in its own process (benchmarks/worker.py); the trainers alternate within a round, and the table
gives medians and their ratios. Lengths come from a file of [P, C, R] triples. Token ids are random, since results do
not depend on them, and so are the weights; only their shapes are those of the named model.
"""

import argparse
import json
import os
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
LABELS = {
    "trl": "TRL",
    "padded": "ours, padded",
    "unshared": "ours, packed without sharing",
    "packed": "ours, packed with sharing",
}
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
    """lengths: a file of benchmarks/lengths/ or a path. batches: measured micro-batches per process."""

    name: str
    lengths: str
    lora: bool
    batches: int


QUICK = (Case("real lengths, full", "real", False, 1),)
FULL = (
    Case("real lengths, full", "real", False, 1),
    Case("short prompts, full", "short", False, 2),
    Case("real lengths, LoRA", "real", True, 1),
)


def own_cases(path: str) -> tuple[Case, ...]:
    return Case(f"{Path(path).stem}, full", path, False, 2), Case(f"{Path(path).stem}, LoRA", path, True, 2)


def read_lengths(name: str) -> list[list[int]]:
    shipped = HERE / "lengths" / f"{name}.json"
    lengths = json.loads((shipped if shipped.exists() else Path(name)).read_text())
    if not all(len(row) == 3 and all(isinstance(n, int) and n > 0 for n in row) for row in lengths):
        raise SystemExit(f"{name}: expected a JSON list of [prompt, chosen, rejected] token counts, each at least 1.")
    return lengths


def stratified(lengths: list[list[int]], batches: int, size: int) -> list[list[int]]:
    """`batches` lists of `size` rows, each with one row from every length quantile, as in a shuffled epoch."""
    order = sorted(range(len(lengths)), key=lambda i: sum(lengths[i]))
    wanted = batches * size
    picked = [order[int((k + 0.5) * len(order) / wanted)] for k in range(wanted)]
    return [picked[b::batches] for b in range(batches)]


def shortest(lengths: list[list[int]], size: int) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: sum(lengths[i]))[:size]


def measure(settings: dict) -> dict:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(settings))
        file.flush()
        done = subprocess.run(
            [sys.executable, str(HERE / "worker.py"), file.name],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])},
        )
    if done.returncode:
        how = "was killed (out of memory?)" if done.returncode == -9 else f"failed with {done.returncode}"
        raise SystemExit(f"{settings['trainer']} {how}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_case(case: Case, options: argparse.Namespace) -> dict:
    lengths = read_lengths(case.lengths)
    batches = stratified(lengths, case.batches, options.batch)
    settings = dict(
        model=options.model,
        lengths=lengths,
        batches=[shortest(lengths, options.batch), *batches],
        batch=options.batch,
        lora=case.lora,
        device=options.device,
        threads=options.threads,
        checkpointing=not options.no_checkpointing,
    )
    rounds: dict[str, list[dict]] = {trainer: [] for trainer in TRAINERS}
    for number in range(options.rounds):
        for trainer in TRAINERS:
            figures = measure({**settings, "trainer": trainer, "count_flops": number == 0})
            rounds[trainer].append(figures)
            print(
                f"  round {number + 1} {trainer:9s} {figures['pairs_per_second']:.4f} pairs/s, "
                f"{figures['peak_memory_gib']:.2f} GiB, loss {figures['loss']:.4f}",
                flush=True,
            )
    result = {}
    for trainer, measured in rounds.items():
        result[trainer] = {
            "pairs_per_second": statistics.median(m["pairs_per_second"] for m in measured),
            "peak_memory_gib": statistics.median(m["peak_memory_gib"] for m in measured),
            "static_memory_gib": measured[0]["static_memory_gib"],
            "flops": measured[0]["flops"],
            "rounds": measured,
        }
    return result


def table(name: str, result: dict) -> str:
    base = result["trl"]
    static = base["static_memory_gib"]
    lines = [
        f"\n**{name}**: weights, gradients and optimizer state take {static:.2f} GiB\n",
        "| | pairs/s | x TRL | slowest and fastest round | peak memory, GiB | of TRL's | FLOPs of TRL's |",
        "|---|---|---|---|---|---|---|",
    ]
    for trainer, row in result.items():
        speeds = [measured["pairs_per_second"] for measured in row["rounds"]]
        lines.append(
            f"| {LABELS[trainer]} | {row['pairs_per_second']:.3f} | "
            f"{row['pairs_per_second'] / base['pairs_per_second']:.2f} | {min(speeds):.3f} to {max(speeds):.3f} | "
            f"{row['peak_memory_gib']:.2f} | {row['peak_memory_gib'] / base['peak_memory_gib']:.2f} | "
            f"{row['flops'] / base['flops']:.2f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, key, title in (
        (axes[0], "pairs_per_second", "pairs per second (more is better)"),
        (axes[1], "peak_memory_gib", "peak memory, GiB (less is better)"),
    ):
        for i, trainer in enumerate(TRAINERS):
            places = [place + 0.2 * i for place in range(len(results))]
            bars = axis.bar(places, [result[trainer][key] for result in results.values()], 0.18, label=LABELS[trainer])
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set_xticks([place + 0.3 for place in range(len(results))], list(results), fontsize=8)
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0]}" if names else platform.machine()


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case, one batch")
    parser.add_argument("--lengths", help="a JSON file of [prompt, chosen, rejected] token counts, instead of ours")
    parser.add_argument("--model", help="a model whose shape to take: a folder or hub id; unset, SmolLM2-135M's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=4, help="pairs per micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each process")
    parser.add_argument(
        "--no-checkpointing", action="store_true", help="no activation checkpointing (both trainers' default is on)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def main() -> None:
    options = parse()
    asked = {name: str(value) for name, value in vars(options).items() if name != "out"}
    model, options.model = options.model, SMOLLM2
    if model is not None:
        from transformers import AutoConfig

        options.model = AutoConfig.from_pretrained(model).to_dict()
    cases = own_cases(options.lengths) if options.lengths else FULL
    if options.quick:
        cases = QUICK
    start, revision = time.perf_counter(), commit()  # before the results make the tree dirty
    results: dict[str, dict] = {}
    for case in cases:
        print(case.name, flush=True)
        results[case.name] = run_case(case, options)
        print(table(case.name, results[case.name]), flush=True)
        about = {
            "commit": revision,
            "date": time.strftime("%Y-%m-%d"),
            "minutes": round((time.perf_counter() - start) / 60, 1),
            "machine": processor(),
            "options": asked,
            "shape": model or "SmolLM2-135M",
            "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")},
            "cases": [asdict(case) for case in cases if case.name in results],
        }
        write(results, about, options)  # after each case, so that an interrupted run keeps its results


def write(results: dict[str, dict], about: dict, options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    name = "-".join(
        [options.device, *(["quick"] if options.quick else []), *(["unchecked"] if options.no_checkpointing else [])]
    )
    (options.out / f"{name}.json").write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    recomputed = "without" if options.no_checkpointing else "with"
    versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
    tables = "\n".join(table(case, result) for case, result in results.items())
    (options.out / f"{name}.md").write_text(
        f"{about['shape']}'s shape, micro-batches of {options.batch} pairs, {recomputed} activation checkpointing in "
        f"both trainers, {options.device}, {options.threads} threads of {about['machine']}, median of {options.rounds} "
        f"rounds, commit {about['commit']}, {versions}; {about['minutes']} minutes.\n{tables}\n"
    )
    plot(results, options.out / f"{name}.png")


if __name__ == "__main__":
    main()
