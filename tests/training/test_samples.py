"""Sampled replies: what is generated, and what each tracker gets."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from orpo_dist import ORPOConfig, ORPOTrainer
from orpo_dist.errors import UserError
from orpo_dist.training import samples as samples_module
from orpo_dist.training.samples import Sample, SampleReplies

SAMPLES = [Sample(3, "how", "like this", "like that"), Sample(3, "why", "because", "so")]
TABLE = [[3, "how", "like this", "like that"], [3, "why", "because", "so"]]
COLUMNS = ["step", "prompt", "reply", "chosen"]


@pytest.fixture(scope="module")
def rows() -> Dataset:
    prompts = ["reset password", "capital of France", "order", "one two three four five six"]
    return Dataset.from_list([{"prompt": text, "chosen": "yes please", "rejected": "no"} for text in prompts])


@pytest.fixture
def trainer(tmp_path, tiny_llama, chat_tokenizer, rows):
    def build(**changes) -> ORPOTrainer:
        options = {"output_dir": str(tmp_path), "use_cpu": True, "max_completion_length": 8, "report_to": "none"}
        return ORPOTrainer(
            model=tiny_llama(len(chat_tokenizer)),
            args=ORPOConfig(**options, generate_during_eval=True),
            eval_dataset=rows,
            processing_class=chat_tokenizer,
            **changes,
        )

    return build


def test_the_trainer_writes_samples_without_a_tracker(trainer, tmp_path):
    trainer = trainer()
    trainer.evaluate()
    written = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in written} == set(trainer_prompts(trainer))
    assert all(set(sample) == set(COLUMNS) and sample["step"] == 0 for sample in written)


def samples_of(trainer) -> SampleReplies:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, SampleReplies))


def sampled(callback, step) -> list[Sample]:
    return callback.sample(step, 8, torch.device("cpu"))


def trainer_prompts(trainer) -> list[str]:
    tokenizer = trainer.processing_class
    return [tokenizer.decode(row["prompt_ids"], skip_special_tokens=True).strip() for row in trainer.eval_dataset]


def test_several_evaluation_sets_are_sampled_once(trainer, tmp_path, rows):
    trainer = trainer()
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    trainer.evaluate()
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4


def test_prompts_of_a_batch_do_not_see_their_padding(trainer, monkeypatch):
    """Greedy replies of the batch are those of each prompt alone."""
    trainer = trainer()
    callback = samples_of(trainer)
    generate = trainer.model.generate
    monkeypatch.setattr(trainer.model, "generate", lambda **kwargs: generate(**{**kwargs, "do_sample": False}))
    together = sampled(callback, 0)
    for row, sample in zip(list(callback._rows), together, strict=True):
        callback._rows = [row]
        assert sampled(callback, 0) == [sample]


def test_replies_are_sampled_not_greedy(trainer):
    callback = samples_of(trainer())
    assert [s.reply for s in sampled(callback, 1)] != [s.reply for s in sampled(callback, 2)]
    assert sampled(callback, 1) == sampled(callback, 1)


def test_training_mode_and_layout_are_put_back(trainer):
    trainer = trainer()
    trainer.model.train()
    before = trainer.model.config._attn_implementation
    sampled(samples_of(trainer), 0)
    assert trainer.model.training
    assert trainer.model.config._attn_implementation == before


def test_without_evaluation_rows_it_is_refused(tmp_path, tiny_llama, chat_tokenizer, rows):
    args = ORPOConfig(output_dir=str(tmp_path), use_cpu=True, generate_during_eval=True, report_to="none")
    with pytest.raises(UserError, match="generate_during_eval"):
        ORPOTrainer(
            model=tiny_llama(len(chat_tokenizer)), args=args, train_dataset=rows, processing_class=chat_tokenizer
        )


def test_a_restarted_run_replaces_its_lines(tmp_path):
    path = tmp_path / "samples.jsonl"
    for step in (0, 2, 4, 2):
        samples_module._write(path, [Sample(step, "p", f"r{step}", "c")])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2]


# ---------------------------------------------------------------------- trackers


def fake_trackers(monkeypatch) -> dict:
    """Modules in place of wandb, trackio and comet_ml that keep what they are sent."""
    sent: dict = {}

    def table(columns=None, data=None, dataframe=None):
        return (columns, data) if dataframe is None else (list(dataframe.columns), dataframe.values.tolist())

    experiment = SimpleNamespace(
        log_table=lambda name, tabular_data, headers: sent.update(comet_ml={name: (headers, tabular_data)})
    )
    modules = {
        "wandb": SimpleNamespace(run=object(), Table=table, log=lambda logs: sent.update(wandb=logs)),
        "trackio": SimpleNamespace(Table=table, log=lambda logs: sent.update(trackio=logs)),
        "comet_ml": SimpleNamespace(get_running_experiment=lambda: experiment),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return sent


def test_every_tracker_that_is_on_gets_the_table(trainer, monkeypatch):
    sent = fake_trackers(monkeypatch)
    trainer = trainer()
    callback = samples_of(trainer)
    monkeypatch.setattr(callback, "sample", lambda step, limit, device: SAMPLES)
    trainer.args.report_to = ["wandb", "trackio", "comet_ml"]
    callback.on_evaluate(trainer.args, trainer.state, trainer.control)
    assert sent == {
        "wandb": {"samples": (COLUMNS, TABLE)},
        "trackio": {"samples": (COLUMNS, TABLE)},
        "comet_ml": {"samples-3.csv": (COLUMNS, TABLE)},
    }


def test_a_tracker_that_is_off_gets_nothing(trainer, monkeypatch):
    sent = fake_trackers(monkeypatch)
    trainer = trainer()
    callback = samples_of(trainer)
    monkeypatch.setattr(callback, "sample", lambda step, limit, device: SAMPLES)
    callback.on_evaluate(trainer.args, trainer.state, trainer.control)
    assert sent == {}


def test_tensorboard_gets_texts(trainer, monkeypatch):
    from transformers.integrations import TensorBoardCallback

    texts = {}
    writer = SimpleNamespace(add_text=lambda tag, text, step: texts.update({(tag, step): text}), flush=lambda: None)
    callback = TensorBoardCallback.__new__(TensorBoardCallback)  # the package may be absent
    callback.tb_writer = writer
    trainer = trainer(callbacks=[callback])
    samples_module._to_tensorboard(trainer.callback_handler, SAMPLES)
    assert set(texts) == {("samples/0", 3), ("samples/1", 3)}
    assert "like this" in texts["samples/0", 3] and "like that" in texts["samples/0", 3]


def test_wandb_offline_for_real(trainer, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(dir=tmp_path, project="test")
    try:
        samples_module._to_wandb(SAMPLES)
    finally:
        run.finish()
    (table,) = tmp_path.rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == TABLE
