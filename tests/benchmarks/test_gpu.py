"""The GPU benchmark runs for real on a CPU: its smallest parts, its state, and what it concludes from figures."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_gate
from benchmarks.gpu_harness import Deadline, Setting, bare, grouped_batches, shuffled_batches, switched, to_device
from benchmarks.gpu_images import build_image_model, image_pairs, image_trainers
from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_profile import kind_of
from benchmarks.gpu_report import markdown, plots, verdicts
from orpo_dist.packing.images import ImageRules
from orpo_dist.packing.lengths import PairLengths

ROOT = Path(__file__).resolve().parents[2]


def gpu(out, *arguments):
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu.py"),
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(out),
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_a_part_on_the_cpu_and_what_is_written(tmp_path):
    done = gpu(tmp_path, "--part", "gate-head")
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "gpu-cpu-tiny.json").read_text())
    assert state["about"]["versions"]["torch"] and state["about"]["commit"]
    assert state["parts"]["gate-head"]["ok"] is True and state["parts"]["gate-head"]["commit"]
    text = (tmp_path / "gpu-cpu-tiny.md").read_text()
    assert "| gate-head | all right | all right | met |" in text
    assert "| gate-families | all right | - | not measured |" in text
    assert (tmp_path / "gpu-cpu-tiny.png").exists() and (tmp_path / "gpu-cpu-tiny.log").exists()


def test_without_a_device_it_says_what_to_do(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "--device cpu --tiny" in done.stdout


def test_resume_runs_what_is_missing_and_no_more(tmp_path, monkeypatch):
    from benchmarks import gpu as program

    parts = {part.name: {"rows": [], "ok": True} for part in PARTS}
    parts["packing"] = {"failed": "took longer than 480 s"}
    (tmp_path / "gpu-cpu-tiny.json").write_text(json.dumps({"about": {}, "parts": parts}))
    ran = []

    def run_part(part, options, seconds, log):
        ran.append((part.name, seconds))
        return {"results": []}

    monkeypatch.setattr(program, "run_part", run_part)
    monkeypatch.setattr(program, "markdown", lambda state: "")
    monkeypatch.setattr(program, "plots", lambda state, path: None)
    monkeypatch.setattr(program, "verdicts", lambda state: [])
    arguments = ["gpu.py", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--resume", "--minutes", "0.5"])
    assert program.main() == 0 and ran == []  # 30 seconds are too few to begin
    monkeypatch.setattr(sys, "argv", [*arguments, "--resume", "--minutes", "5"])
    program.main()
    assert [name for name, _ in ran] == ["packing"] and 290 < ran[0][1] <= 300
    monkeypatch.setattr(sys, "argv", arguments)
    program.main()
    assert [name for name, _ in ran[1:]] == [part.name for part in PARTS]


def test_image_pairs_have_one_loss_in_three_layouts_and_depend_on_the_pixels():
    setting = Setting(torch.device("cpu"), tiny=True)
    model = build_image_model(setting)
    lengths, rows = image_pairs(setting, model, 2)
    assert lengths[0].prompt == len(rows[0]["prompt_ids"]) == 144 + 2 + 24
    with torch.no_grad():
        for parameter in bare(model).parameters():
            parameter.mul_(1 if parameter.dim() < 2 else 4)  # random weights are so small that no image is seen

    def loss(trainer, rows):
        with switched(model, trainer), torch.no_grad():
            return trainer.loss(model, to_device(trainer.collate(rows), setting.device)).item()

    packed, padded, duplicated = (loss(trainer, rows) for trainer in image_trainers(model))
    assert packed == pytest.approx(duplicated, rel=1e-5) and padded == pytest.approx(duplicated, rel=1e-5)
    blank = [{**row, "pixels": torch.zeros_like(row["pixels"])} for row in rows]
    assert abs(loss(image_trainers(model)[0], blank) - packed) > 1e-3 * packed
    assert not any(p.requires_grad for name, p in model.named_parameters() if "visual" in name)


@pytest.mark.parametrize("rules", [None, ImageRules()], ids=["right", "images numbered as text"])
def test_the_gate_sees_wrong_positions_of_images(monkeypatch, rules):
    def trainers(model):
        packed, *padded = image_trainers(model)
        inner = packed.collate.inner
        changed = replace(packed.collate, inner=replace(inner, rules=rules or inner.rules))
        return replace(packed, collate=changed), *padded

    build = gpu_gate._families(True)["Qwen2.5-VL"]
    monkeypatch.setattr(gpu_gate, "_families", lambda tiny: {"Qwen2.5-VL": build})
    monkeypatch.setattr(gpu_gate, "image_trainers", trainers)
    result = gpu_gate.families(Setting(torch.device("cpu"), tiny=True), Deadline(600))
    assert result["ok"] is (rules is None)


def figures(speed, above=None, mfu=None):
    memory = {"above_static": above, "peak_allocated": above, "peak_reserved": above}
    return {"pairs_per_second": speed, "mfu": mfu, "note": "", **memory}


def state_with(version="2.13.0", device=True, **parts):
    about = {"device": "a card", "date": "d", "commit": "c", "versions": {"torch": version}, "tiny": False}
    return {"about": {**about, **({"capability": "9.0"} if device else {})}, "parts": parts}


CASE = {
    "micro_batch": 8, "pairs": 16, "static_bytes": 0,
    "tokens": {"shared": 1, "padded": 1, "padded, grouped": 1},
    "trainers": {"ours": figures(10, 4, 0.35), "TRL, default": figures(4, 9, 0.1), "TRL, best": figures(7, 8, 0.2)},
}  # fmt: skip


def found(state, what):
    return next(check for check in verdicts(state) if check.what == what)


def test_what_is_concluded_from_figures():
    state = state_with(**{"8b-lora": CASE})
    assert found(state, "8b-lora: pairs/s over TRL, default").met is True  # 2.5
    assert found(state, "8b-lora: pairs/s over TRL, best").met is False  # 1.43
    assert found(state, "8b-lora: memory above static, of TRL, default").met is True  # 0.44
    assert found(state, "8b-lora: memory above static, of TRL, best").met is True  # 0.5
    assert found(state, "8b-lora: MFU on shared FLOPs").met is False
    assert found(state_with("2.11.0+cu130", **{"8b-lora": CASE}), "8b-lora: MFU on shared FLOPs").met is True
    assert found(state, "1.7b-full: pairs/s over TRL, best") == found(state_with(), "1.7b-full: pairs/s over TRL, best")
    assert found(state, "images: pairs/s over ours padded").met is None


def test_a_cpu_is_not_judged_and_out_of_memory_is_not_a_figure():
    assert found(state_with(device=False, **{"8b-lora": CASE}), "8b-lora: pairs/s over TRL, best").met is None
    trainers = {**CASE["trainers"], "TRL, best": {"failed": "out of memory", "note": "n"}}
    state = state_with(**{"8b-lora": {**CASE, "trainers": trainers}})
    assert found(state, "8b-lora: pairs/s over TRL, best").found is None
    assert "| TRL, best | out of memory |" in markdown(state)


def test_a_gate_that_fails_names_its_cases(tmp_path):
    rows = [
        {"case": "sinks", "kernel": "FlexAttention", "error": 0.3, "ok": False},
        {"case": "plain", "kernel": "torch varlen", "error": 1e-3, "ok": True},
    ]
    state = state_with(**{"gate-kernels": {"ok": False, "rows": rows}})
    assert found(state, "gate-kernels").met is False and found(state, "gate-kernels").found == "sinks"
    text = markdown(state)
    assert (
        "| gate-kernels | all right | sinks | NOT MET |" in text
        and "| sinks | FlexAttention | 3.0e-01 | WRONG |" in text
    )
    plots(state_with(**{"8b-lora": CASE}), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "operation, shapes, kind",
    [
        ("torch_attn::_varlen_attn", [[900, 32, 128]], "attention"),
        ("aten::mm", [[900, 4096], [4096, 12288]], "MLP"),
        ("aten::mm", [[900, 4096], [4096, 4096]], "projections"),
        ("aten::mm", [[512, 4096], [4096, 151936]], "head"),
        ("aten::_log_softmax", [[512, 151936], [], []], "head"),
        ("aten::_fused_adamw_", [[], []], "optimizer"),
        ("aten::index_select", [[900, 8, 128], [], [1200]], "key gather"),
        ("aten::mul", [[900, 12288], [900, 12288]], "MLP"),
        ("aten::mul", [[900, 4096]], "the rest"),
    ],
)
def test_kinds_of_work(operation, shapes, kind):
    assert kind_of(operation, shapes, 12288, 151936) == kind


def test_batches_hold_the_same_pairs_and_groups_pad_less():
    lengths = [PairLengths(10 * i % 70 + 1, 7 * i % 50 + 1, 13 * i % 90 + 1) for i in range(40)]
    batches = shuffled_batches(lengths, 4, 8)
    grouped = grouped_batches(batches, lengths)
    assert sorted(i for b in batches for i in b) == sorted(i for b in grouped for i in b)

    def padded(b):
        return sum(max(lengths[i].prompt + max(lengths[i].chosen, lengths[i].rejected) for i in batch) for batch in b)

    assert [len(batch) for batch in grouped] == [8] * 4 and padded(grouped) < padded(batches)
