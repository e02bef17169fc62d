"""The demo on a tiny model."""

import json

import pytest

from orpo_dist.demo import command as demo


@pytest.fixture
def tiny_model(tmp_path, tiny_llama, chat_tokenizer):
    folder = tmp_path / "model"
    tiny_llama(len(chat_tokenizer)).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


def test_demo_trains_and_reports(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(demo, "REPLY_TOKENS", 4)
    folder = tmp_path / "demo"
    argv = ["--model", str(tiny_model), "--training-pairs", "24", "--held-out-pairs", "10", "--output-dir", str(folder)]
    assert demo.main(argv) == 0

    printed = capsys.readouterr().out
    summary = json.loads((folder / "run_summary.json").read_text(encoding="utf-8"))
    assert (summary["pairs"], summary["eval_pairs"], summary["dropped"]) == (24, 10, 0)
    assert summary["steps"] == 3
    for name, title in demo.METRICS:
        before, after = summary["eval_before"][name], summary["eval_after"][name]
        assert any(
            title in line and f"{before:.4f}" in line and f"{after:.4f}" in line for line in printed.splitlines()
        )
    assert summary["eval_after"]["nll_loss"] != summary["eval_before"]["nll_loss"]
    assert printed.count("customer:") == printed.count("before: ") == printed.count("after: ") == demo.REPLIES
    assert str(folder) in printed
    for name, _ in demo.WRITTEN:
        assert (folder / name).exists(), name
