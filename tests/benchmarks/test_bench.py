"""The benchmark program itself, with a tiny model: its figures mean nothing, its results must agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench.py"


def bench(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(BENCH), *options], capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
def test_all_trainers_on_the_same_batches(tmp_path, tiny_llama):
    model = tiny_llama(512)
    model.config.save_pretrained(tmp_path / "model")
    lengths = tmp_path / "mine.json"
    lengths.write_text(json.dumps([[60, 20, 30], [40, 9, 50], [30, 30, 30], [90, 10, 10]] * 3))
    done = bench(
        *("--lengths", str(lengths), "--model", str(tmp_path / "model"), "--rounds", "1", "--threads", "1"),
        *("--batch", "2", "--out", str(tmp_path / "out")),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((tmp_path / "out" / "cpu.json").read_text())
    assert set(written["results"]) == {"mine, full", "mine, LoRA"}
    for result in written["results"].values():
        losses = {name: row["rounds"][0]["loss"] for name, row in result.items()}
        assert losses == pytest.approx(dict.fromkeys(losses, losses["trl"]), abs=1e-3)
        assert result["packed"]["flops"] < result["unshared"]["flops"] < result["padded"]["flops"]
    assert "| ours, packed with sharing |" in (tmp_path / "out" / "cpu.md").read_text()
    assert (tmp_path / "out" / "cpu.png").stat().st_size > 1000


def test_lengths_that_cannot_be_read_are_told(tmp_path):
    lengths = tmp_path / "mine.json"
    lengths.write_text("[[3, 0, 2]]")
    done = bench("--lengths", str(lengths), "--out", str(tmp_path))
    assert done.returncode and "at least 1" in done.stderr
