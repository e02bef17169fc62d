"""What of a run's folder goes to the hub."""

from concurrent.futures import Future
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from orpo_dist.run.upload import allowed_files, stage, unstage, upload_run

PUBLIC = [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "config.json",
    "generation_config.json", "merges.txt", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "modeling_own.py", "preprocessor_config.json", "recipe.yaml", "run_summary.json", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer_config.json", "training_args.bin", "vocab.json",
    "additional_chat_templates/tool_use.jinja", "merged/config.json", "merged/model.safetensors",
]  # fmt: skip
PRIVATE = [
    ".owner.json", "STOP", "dropped_rows.jsonl", "log.jsonl", "loss_spikes.jsonl", "nonfinite_steps.jsonl",
    "samples.jsonl", "slurm/job.sbatch", "slurm/recipe.yaml", "slurm/logs/1.log", "tensorboard/events", "optimizer.pt",
    "checkpoint-1/model.safetensors", "_saving/checkpoint-2/config.json", "merged/log.jsonl", ".env", "notes.txt",
    "wandb/run/config.yaml", "train.json",
]  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    for name in PUBLIC + PRIVATE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_the_list_of_what_is_allowed(run):
    assert sorted(map(str, allowed_files(run))) == sorted(PUBLIC)


def test_a_summary_that_waits_for_the_upload_goes_along(run):
    (run / "run_summary.json").rename(run / ".run_summary.json")
    staged = stage(run)
    assert sorted(str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file()) == sorted(PUBLIC)
    unstage(run)
    assert not staged.exists() and not (run / "run_summary.json").exists()


def test_nothing_is_left_behind(run, monkeypatch):
    sent, future = [], Future()

    def upload(self, *, folder_path, run_as_future, **options):
        sent.append({str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()})
        if options.get("revision") == "broken":
            raise ConnectionError
        return future if run_as_future else "done"

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    before = sorted(run.rglob("*"))
    assert upload_run(run, "me/it", blocking=True) == "done"
    assert sorted(run.rglob("*")) == before
    with pytest.raises(ConnectionError):
        upload_run(run, "me/it", blocking=True, revision="broken")
    assert sorted(run.rglob("*")) == before
    assert upload_run(run, "me/it", blocking=False) is future
    assert (run / "_upload").is_dir()
    future.set_result(None)
    assert sorted(run.rglob("*")) == before
    assert sent == [set(PUBLIC)] * 3
