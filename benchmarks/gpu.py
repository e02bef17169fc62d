"""Checks and measures the GPU path with one command, in parts of at most 8 minutes, the most informative first.

    python benchmarks/gpu.py                          everything
    python benchmarks/gpu.py --resume --minutes 9     as many of the missing parts as fit into 9 minutes
    python benchmarks/gpu.py --part gate-kernels      one part (may be given several times)
    python benchmarks/gpu.py --device cpu --tiny      the whole program on a CPU, with tiny shapes

Needs torch, transformers, accelerate and peft; no network, no datasets, trl, deepspeed or bitsandbytes. Writes
gpu-DEVICE.json, .md, .png and .log into benchmarks/results/. The JSON is the state: it is written after every part, and
--resume continues from it. docs/gpu.md describes what is measured and the bounds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PART_SECONDS = 480
LEAST_SECONDS = 45  # no part is started with less time left
PACKAGES = ("torch", "transformers", "accelerate", "peft", "triton", "flash-attn", "liger-kernel", "trl")

sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts import PARTS, Part  # noqa: E402
from benchmarks.gpu_report import markdown, plots, verdicts  # noqa: E402


def run_part(part: Part, options: argparse.Namespace, seconds: float, log: Path) -> dict[str, Any]:
    """The part's result, or {"failed": why}."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings = {"device": options.device, "tiny": options.tiny, "seconds": 0.75 * seconds}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.gpu_parts", part.name, file.name]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {seconds:.0f} s"}
    with log.open("a") as text:
        text.write(f"==== {part.name}\n{done.stderr}\n")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit code {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


_DEVICE = """
import json, torch
p = torch.cuda.get_device_properties(0)
print(json.dumps({"device": p.name, "memory_gib": round(p.total_memory / 2**30, 1),
                  "capability": f"{p.major}.{p.minor}", "cuda": torch.version.cuda}))
"""


def about(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"device": platform.processor() or platform.machine(), "versions": {}}
    for package in PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    if options.device == "cuda":  # in another process: this one should not allocate device memory
        found |= json.loads(subprocess.run([sys.executable, "-c", _DEVICE], capture_output=True, check=True).stdout)
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        **found,
        "commit": done.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "tiny": options.tiny,
    }


def result_name(device: str, tiny: bool) -> str:
    words = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    return f"gpu-{words}{'-tiny' if tiny else ''}"


def write(folder: Path, name: str, state: dict[str, Any]) -> None:
    temporary = folder / f"{name}.json.partial"
    temporary.write_text(json.dumps(state, indent=1) + "\n")
    temporary.rename(folder / f"{name}.json")
    (folder / f"{name}.md").write_text(markdown(state))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=[part.name for part in PARTS], help="only this one")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there and do the rest")
    parser.add_argument("--minutes", type=float, help="start no part that would run beyond this")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: to try the program, not to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.list:
        for part in PARTS:
            print(f"{part.name:14s} {part.about}")
        return 0
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("No CUDA device here. To try the program: python benchmarks/gpu.py --device cpu --tiny")
            return 2
    elif not options.tiny:
        print("On a CPU only --tiny is of use: the full shapes take hours. For CPU figures see benchmarks/bench.py.")
        return 2
    facts = about(options)
    name = result_name("cpu" if options.device == "cpu" else facts["device"], options.tiny)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    state: dict[str, Any] = {"about": facts, "parts": {}}
    if path.exists() and (options.resume or options.part):
        state["parts"] = json.loads(path.read_text())["parts"]
    wanted = [p for p in PARTS if (p.name in options.part if options.part else not _done(state, p.name))]
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    for part in wanted:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            print(
                f"Time is up; missing: {', '.join(p.name for p in wanted if not _done(state, p.name))}. Use --resume."
            )
            break
        print(f"{part.name}: {part.about} ...", flush=True)
        begun = time.monotonic()
        result = run_part(part, options, min(PART_SECONDS, left), options.out / f"{name}.log")
        seconds = time.monotonic() - begun
        if "failed" in result and left < PART_SECONDS and seconds >= left - 1:
            print("  cut short by --minutes; it will be run again")
            continue
        state["parts"][part.name] = {**result, "seconds": round(seconds, 1), "commit": facts["commit"]}
        write(options.out, name, state)
        print(f"  {result.get('failed') or result.get('skipped') or 'done'} ({seconds:.0f} s)", flush=True)
        if part.name.startswith("gate") and not result.get("ok"):
            print("  NOT PASSED: figures of a path that computes something else are worth nothing.", flush=True)
    write(options.out, name, state)
    plots(state, options.out / f"{name}.png")
    print(f"\n{markdown(state)}\nWritten: {path.with_suffix('')}.json, .md, .png, .log")
    failed = [check for check in verdicts(state) if check.met is False]
    return 1 if failed and not options.tiny else 0


def _done(state: dict[str, Any], name: str) -> bool:
    return name in state["parts"] and "failed" not in state["parts"][name]


if __name__ == "__main__":
    raise SystemExit(main())
