"""`orpo-dist train` from a recipe to a run's folder, in this process."""

import json
import os
import signal
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback

from orpo_dist import cli
from orpo_dist.errors import RunStopped, UserError
from orpo_dist.recipe.recipe import Recipe
from orpo_dist.run.checkpoint import seal
from orpo_dist.run.resume import checkpoint_to_resume
from orpo_dist.train import main, train
from tests.pair_files import write_pairs

SECRET = "hf_notatokenatall"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """train.jsonl with 12 pairs and one bad row, test.jsonl with 5 pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.jsonl", 12, seed=1)
    write_pairs(folder / "test.jsonl", 5, seed=2)
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "help", "chosen": "", "rejected": "no"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, tiny_llama, chat_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(len(chat_tokenizer)).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(pairs, tiny_model):
    """Fields of a small run, with changes."""

    def build(output: Path, **changes) -> dict:
        return {
            "model_name_or_path": str(tiny_model),
            "dataset_name": str(pairs),
            "max_bad_rows": 1,
            "output_dir": str(output),
            "max_length": 64,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "use_cpu": True,
            **changes,
        }

    return build


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, options):
    """A run with everything on, through the command line; its folder."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    recipe = options(
        folder,
        dataset_test_split="test",
        use_peft=True,
        merge_adapter=True,
        generate_during_eval=True,
        max_completion_length=12,
        eval_strategy="steps",
        eval_steps=2,
        hub_token=SECRET,
        env={"WANDB_API_KEY": SECRET},
    )
    path = folder.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert cli.main(["train", str(path)]) == 0
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "run_summary.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(autouse=True)
def no_token_left(monkeypatch):
    """Runs move tokens to the environment; tests must not see each other's."""
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("WANDB_API_KEY", "")


# ---------------------------------------------------------------------- the folder of a run


def test_summary(lora_run):
    summary = summary_of(lora_run)
    assert (summary["pairs"], summary["dropped"], summary["eval_pairs"]) == (12, 1, 5)
    assert (summary["steps"], summary["epochs"], summary["world_size"], summary["global_batch_size"]) == (6, 2.0, 1, 4)
    for moment in ("eval_before", "eval_after"):
        assert {"loss", "nll_loss", "rewards/accuracies", "rewards/margins", "log_odds_ratio"} <= set(summary[moment])
        assert not any(name.startswith("eval_") or "runtime" in name for name in summary[moment])
    assert summary["eval_after"]["nll_loss"] < summary["eval_before"]["nll_loss"]
    assert summary["eval_after"]["rewards/margins"] > summary["eval_before"]["rewards/margins"]
    assert summary["pairs_per_second"] == pytest.approx(24 / summary["train_seconds"], rel=0.01)
    assert len(summary["peak_memory_gib"]) == 1 and summary["peak_memory_gib"][0] > 0.1
    assert summary["versions"]["torch"] == version("torch")
    assert 0 < summary["trainable_parameters"] < summary["parameters"] / 2


def test_log_has_every_event_once(lora_run):
    events = lines(lora_run / "log.jsonl")
    assert [event["step"] for event in events if "loss" in event] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in events if "eval_loss" in event] == [0, 2, 4, 6]


def test_dropped_rows_and_samples(lora_run):
    assert [row["row"] for row in lines(lora_run / "dropped_rows.jsonl")] == [13]
    samples = lines(lora_run / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0] * 4 + [2] * 4 + [4] * 4 + [6] * 4
    prompts = [sample["prompt"] for sample in samples]
    assert prompts[:4] == prompts[4:8]
    assert len(set(prompts[:4])) == 4
    assert any(sample["reply"] for sample in samples)
    assert all(sample["chosen"].startswith("yes ") for sample in samples)


def test_adapter_reloads_in_plain_peft_and_merged_in_transformers(lora_run, chat_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(lora_run)
    assert tokenizer.chat_template == chat_tokenizer.chat_template
    assert GenerationConfig.from_pretrained(lora_run).eos_token_id is not None
    tokens = tokenizer("how do I reset my password", return_tensors="pt")["input_ids"]
    adapted = AutoPeftModelForCausalLM.from_pretrained(lora_run).eval()
    merged = AutoModelForCausalLM.from_pretrained(lora_run / "merged").eval()
    with torch.no_grad():
        of_adapter, of_merged = adapted(tokens).logits, merged(tokens).logits
        with adapted.disable_adapter():
            of_base = adapted(tokens).logits
    assert (of_adapter - of_base).abs().max() > 0.1
    torch.testing.assert_close(of_adapter, of_merged, rtol=1e-4, atol=1e-4)


def test_model_card(lora_run):
    card = ModelCard.load(lora_run / "README.md")
    assert {"orpo", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder is no hub id
    assert card.data.datasets is None
    after = summary_of(lora_run)["eval_after"]
    assert f"{after['rewards/margins']:.4f}" in card.text
    assert "- learning_rate: 0.01" in card.text


def test_recipe_repeats_the_run(lora_run, tmp_path):
    again = Recipe.parse([str(lora_run / "recipe.yaml"), "--output_dir", str(tmp_path), "--merge_adapter", "false"])
    summary = train(again)
    assert summary.eval_after == pytest.approx(summary_of(lora_run)["eval_after"])


def test_no_secret_is_written(lora_run):
    files = [path for path in lora_run.rglob("*") if path.is_file()]
    assert {"training_args.bin", "recipe.yaml", "run_summary.json", "README.md"} <= {path.name for path in files}
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_full_fine_tuning_without_evaluation(options, tmp_path, tiny_model):
    summary = train(Recipe.from_mapping(options(tmp_path, max_samples=8, max_steps=2, chat_template="zephyr")))
    assert (summary.pairs, summary.steps, summary.eval_before, summary.eval_after) == (8, 2, None, None)
    assert summary.trainable_parameters == summary.parameters
    assert "<|assistant|>" in AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert not torch.equal(weights(tmp_path)["lm_head.weight"], weights(tiny_model)["lm_head.weight"])


def test_continuing_an_adapter(lora_run, options, tmp_path):
    summary = train(
        Recipe.from_mapping(
            options(
                tmp_path,
                dataset_test_split="test",
                adapter_name_or_path=str(lora_run),
                max_steps=1,
                max_completion_length=12,
            )
        )
    )
    assert summary.eval_before == pytest.approx(summary_of(lora_run)["eval_after"], rel=1e-4, abs=1e-5)
    assert summary.adapter


def test_sampling_replies_does_not_change_training(options, tmp_path):
    """LoRA dropout draws from the same random state as sampling would."""
    runs = {}
    for sampled in (False, True):
        changes = {"use_peft": True, "lora_dropout": 0.5, "dataset_test_split": "test", "max_steps": 2}
        folder = tmp_path / str(sampled)
        changes |= {"generate_during_eval": sampled, "eval_strategy": "steps", "eval_steps": 1}
        train(Recipe.from_mapping(options(folder, max_completion_length=4, **changes)))
        runs[sampled] = AutoPeftModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in runs[False].items():
        assert torch.equal(tensor, runs[True][name]), name


# ---------------------------------------------------------------------- stopping and resuming


class StopAt(TrainerCallback):
    """Ends training early, as a time limit would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_stopped_run_resumes_to_the_same_end(options, tmp_path, monkeypatch, capsys):
    changes = {"dataset_test_split": "test", "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    changes |= {"eval_steps": 2}
    whole = train(Recipe.from_mapping(options(tmp_path / "whole", **changes)))

    with monkeypatch.context() as stopped:
        from orpo_dist import trainer

        original = trainer.ORPOTrainer.__init__

        def with_stop(self, *args, **kwargs):
            kwargs["callbacks"] = [*kwargs["callbacks"], StopAt(5)]
            original(self, *args, **kwargs)

        stopped.setattr(trainer.ORPOTrainer, "__init__", with_stop)
        with pytest.raises(KeyboardInterrupt):
            train(Recipe.from_mapping(options(tmp_path / "cut", **changes)))
    assert not (tmp_path / "cut" / "run_summary.json").exists()
    assert lines(tmp_path / "cut" / "log.jsonl")[-1]["step"] == 5  # and step 5 happens again after resuming from step 4

    with pytest.raises(UserError, match="resume_from_checkpoint auto"):
        train(Recipe.from_mapping(options(tmp_path / "cut", **changes)))
    capsys.readouterr()
    resumed = train(Recipe.from_mapping(options(tmp_path / "cut", resume_from_checkpoint=True, **changes)))
    assert "Resuming from" in capsys.readouterr().out
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "cut")[name]), name
    assert resumed.eval_before == whole.eval_before
    assert resumed.eval_after == whole.eval_after
    assert resumed.steps == 6
    events = lines(tmp_path / "cut" / "log.jsonl")
    assert [event["step"] for event in events if "loss" in event] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in events if "eval_loss" in event] == [0, 2, 4, 6]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("saving", [{"save_strategy": "steps", "save_steps": 2}, {"save_strategy": "epoch"}, {}])
def test_a_finished_run_started_again_says_so_and_changes_nothing(options, tmp_path, capsys, saving):
    """With a constant learning rate, another step would change the weights."""
    folder = tmp_path / "run"
    recipe = options(
        folder,
        dataset_test_split="test",
        use_peft=True,
        merge_adapter=True,
        lr_scheduler_type="constant",
        resume_from_checkpoint="auto",
        max_steps=4,
        **saving,
    )
    first = train(Recipe.from_mapping(recipe))
    before = contents(folder)
    for _ in range(3):
        capsys.readouterr()
        assert train(Recipe.from_mapping(recipe)).steps == first.steps
        assert f"{folder} holds the model of step 4" in capsys.readouterr().out
        assert contents(folder) == before


@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_killed_after_its_last_checkpoint_trains_no_further_step(options, tmp_path, monkeypatch, steps):
    """4 is inside an epoch of three steps, 3 at its end."""
    changes = {"dataset_test_split": "test", "save_strategy": "steps", "save_steps": 1, "max_steps": steps}
    changes |= {"lr_scheduler_type": "constant", "resume_from_checkpoint": "auto"}
    whole = train(Recipe.from_mapping(options(tmp_path / "whole", **changes)))
    cut = tmp_path / "cut"

    def killed(*args):
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr("orpo_dist.train._save_model", killed)
            with pytest.raises(KeyboardInterrupt):
                train(Recipe.from_mapping(options(cut, **changes)))
        assert not (cut / "run_summary.json").exists()
        assert max(int(path.name.split("-")[1]) for path in cut.glob("checkpoint-*")) == steps
    resumed = train(Recipe.from_mapping(options(cut, **changes)))
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(cut)[name]), name
    assert resumed.steps == whole.steps == steps
    assert (resumed.train_loss, resumed.eval_after) == (whole.train_loss, whole.eval_after)
    events = [[sorted(event) for event in lines(folder / "log.jsonl")] for folder in (tmp_path / "whole", cut)]
    assert events[0] == events[1]


def test_a_finished_run_goes_on_where_something_is_left_to_do(options, tmp_path):
    folder = tmp_path / "run"
    changes = {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "auto"}
    assert train(Recipe.from_mapping(options(folder, max_steps=2, **changes))).steps == 2
    assert train(Recipe.from_mapping(options(folder, max_steps=3, **changes))).steps == 3
    weights = (folder / "model.safetensors").read_bytes()
    for damaged in (None, b"", weights[:-1]):
        (folder / "model.safetensors").unlink()
        if damaged is not None:
            (folder / "model.safetensors").write_bytes(damaged)
        assert train(Recipe.from_mapping(options(folder, max_steps=3, **changes))).steps == 3
        assert (folder / "model.safetensors").read_bytes() == weights


def test_a_stop_in_a_last_act_names_the_checkpoint_it_can_go_on_from(options, tmp_path, monkeypatch):
    def stopped(*args):
        raise RunStopped("SIGTERM")  # as the handler of a signal does outside of steps

    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "resume_from_checkpoint": "auto"}
    with monkeypatch.context() as patched, pytest.raises(RunStopped) as end:
        patched.setattr("orpo_dist.train._summarise", stopped)
        train(Recipe.from_mapping(options(tmp_path / "run", **changes)))
    assert (end.value.step, end.value.checkpoint) == (2, str(tmp_path / "run" / "checkpoint-2"))
    assert not (tmp_path / "run" / "run_summary.json").exists()
    assert train(Recipe.from_mapping(options(tmp_path / "run", **changes))).steps == 2


def test_a_stop_while_tokenising_in_several_processes(options, tmp_path, monkeypatch):
    def stopped(*args):
        try:
            raise RunStopped("SIGTERM")
        finally:
            raise TimeoutError  # as Dataset.map(num_proc=2) does when a signal raises in it

    monkeypatch.setattr("orpo_dist.run.prepare.prepare", stopped)
    with pytest.raises(RunStopped, match="SIGTERM"):
        train(Recipe.from_mapping(options(tmp_path / "run")))


def test_a_stop_while_the_recipe_is_read(monkeypatch):
    def parse(argv):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)
        raise AssertionError("the signal was not heeded")

    monkeypatch.setattr(Recipe, "parse", parse)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with pytest.raises(RunStopped, match="SIGUSR1"):
            main(["recipe.yaml"])
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_checkpoints_without_an_optimizer_are_warned_of_at_the_start(options, tmp_path, caplog):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    train(Recipe.from_mapping(options(tmp_path / "a", save_only_model=True, **changes)))
    assert "save_only_model: the checkpoints have no optimizer" in caplog.text
    caplog.clear()
    train(Recipe.from_mapping(options(tmp_path / "b", **changes)))
    assert "save_only_model" not in caplog.text


def test_which_checkpoint_is_meant(tmp_path, capsys):
    folder = tmp_path / "run"
    for asked in (None, "auto", "AUTO", "false"):
        assert checkpoint_to_resume(asked, folder) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint_to_resume("true", folder)
    for step in (9, 10, 11):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        if step < 11:
            seal(folder / f"checkpoint-{step}", step, 1, {})
    assert checkpoint_to_resume("auto", folder) == str(folder / "checkpoint-10")
    assert "Skipping checkpoint-11: no complete.json" in capsys.readouterr().out
    assert checkpoint_to_resume("true", folder) == str(folder / "checkpoint-10")
    assert checkpoint_to_resume(str(folder / "checkpoint-9"), folder) == str(folder / "checkpoint-9")
    for other in (tmp_path, folder / "checkpoint-11"):
        with pytest.raises(UserError, match="is not a usable checkpoint"):
            checkpoint_to_resume(str(other), folder)
    with pytest.raises(UserError, match="holds checkpoint-11 of an earlier run"):
        checkpoint_to_resume(None, folder)


# ---------------------------------------------------------------------- refusals, before a model is loaded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_strategy": "epoch"}, "eval_strategy needs rows to evaluate on"),
        ({"generate_during_eval": True}, "generate_during_eval needs rows to evaluate on"),
        ({"report_to": "wanbd"}, "Did you mean wandb?"),
        ({"max_bad_rows": 0}, "max_bad_rows"),
        ({"dataset_name": "no-such-file.jsonl"}, "no-such-file.jsonl"),
        ({"dataset_train_split": "nope"}, "nope"),
        ({"push_to_hub": True}, "push_to_hub"),
        ({"resume_from_checkpoint": "no/such/folder"}, "is not a usable checkpoint"),
        ({"model_init_kwargs": "text"}, "model_init_kwargs"),
    ],
)
def test_refused_before_training(options, tmp_path, changes, message, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(options(tmp_path / "run", **changes)))
    assert cli.main(["train", str(path)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_missing_hub_model_is_one_line(options, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(options(tmp_path / "run", model_name_or_path="no-such/model")))
    assert cli.main(["train", str(path)]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("orpo-dist: error")]
    assert len(told) == 1 and "no-such/model" in told[0]


# ---------------------------------------------------------------------- the hub


def test_push_sends_the_finished_folder(options, tmp_path, monkeypatch):
    sent = []

    class Repo:
        repo_id = "me/tuned"

    def upload(self, *, repo_id, folder_path, **rest):
        sent.append((repo_id, {path.name for path in Path(folder_path).iterdir()}, rest))

    monkeypatch.setattr(HfApi, "whoami", lambda self, *args, **kwargs: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: Repo())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    recipe = options(tmp_path, max_steps=1, use_peft=True, push_to_hub=True, hub_model_id="me/tuned", hub_token=SECRET)
    train(Recipe.from_mapping(recipe))
    repo_id, files, _ = sent[-1]
    assert repo_id == "me/tuned"
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md", "run_summary.json", "recipe.yaml"} <= files
    card = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("me/tuned")' in card
    assert "Odds Ratio" in card or "odds ratio" in card  # ours, not the draft of transformers
    assert SECRET.encode() not in (tmp_path / "training_args.bin").read_bytes()
