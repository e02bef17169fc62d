"""Recipes: files, flags, both, and what a wrong one is told."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from orpo_dist import ORPOConfig
from orpo_dist.config import OWN_OPTIONS
from orpo_dist.errors import UserError
from orpo_dist.options.data import DataArguments
from orpo_dist.recipe.recipe import Recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BASE = "model_name_or_path: owner/model\ndataset_name: pairs.jsonl\n"


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(BASE + text)
        return str(path)

    return write


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        Recipe.parse(argv)
    return str(caught.value)


def test_fields_reach_their_part(recipe_file):
    recipe = Recipe.parse([recipe_file("lora_r: 4\nuse_peft: true\nbeta: 0.2\nmax_samples: 7\noutput_dir: out\n")])
    assert (recipe.model.lora_r, recipe.model.use_peft) == (4, True)
    assert (recipe.training.beta, recipe.training.output_dir) == (0.2, "out")
    assert (recipe.data.dataset_name, recipe.data.max_samples) == ("pairs.jsonl", 7)


def test_scientific_notation_is_a_number(recipe_file):
    # YAML 1.1 reads 1e-5 as text.
    assert yaml.safe_load("1e-5") == "1e-5"
    assert Recipe.parse([recipe_file("learning_rate: 1e-5")]).training.learning_rate == 1e-5


@pytest.mark.parametrize("written", ["no", "'no'", "false"])
def test_no_as_a_strategy_is_not_a_boolean(recipe_file, written):
    assert Recipe.parse([recipe_file(f"save_strategy: {written}")]).training.save_strategy == "no"


def test_flags_win_over_the_file(recipe_file):
    path = recipe_file("lora_r: 4\nuse_peft: true\ngradient_checkpointing: true\n")
    recipe = Recipe.parse([path, "--lora_r", "8", "--no_gradient_checkpointing", "--learning-rate", "3e-4"])
    assert recipe.model.lora_r == 8
    assert recipe.training.gradient_checkpointing is False
    assert recipe.training.learning_rate == 3e-4


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"], ["--beta", "0.3", "--config", "{}"]])
def test_config_flag_names_the_file(recipe_file, form):
    path = recipe_file("lora_r: 5")
    assert Recipe.parse([part.format(path) for part in form]).model.lora_r == 5


def test_flags_alone_are_enough():
    recipe = Recipe.parse(["--model_name_or_path", "a/b", "--dataset_name", "d.csv", "--lora_target_modules", "q", "v"])
    assert recipe.model.lora_target_modules == ["q", "v"]


def test_output_folder_is_named_after_the_recipe(recipe_file):
    assert Recipe.parse([recipe_file("")]).training.output_dir == "runs/recipe"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "line 3: unknown field `learning_rat`. Did you mean `learning_rate`?"),
        ("lr: 1", "Did you mean `learning_rate`?"),
        ("warmup_ratio: 0.1", "Use warmup_steps: a value below 1 is a share of all steps."),
        ("zzzzzz: 1", "docs/config.md"),
        ("learning_rate: fast", "line 3: `learning_rate` is 'fast', which is not a number."),
        ("per_device_train_batch_size: 2.5", "`per_device_train_batch_size` is 2.5, which is not a whole number."),
        ("use_peft: maybe", "`use_peft` is 'maybe', which is not true or false."),
        ("max_length: true", "`max_length` is 'true', which is not a whole number."),
        ("lora_r: [1, 2]", "`lora_r` takes one value, not a list."),
        ("beta: {a: 1}", "`beta` takes one value, not a mapping."),
        ("seed:", "`seed` has no value."),
        ("truncation_side: up", "`truncation_side` is 'up', which is not one of left, right."),
        ("lr_scheduler_type: coosine", "which is not one of linear, cosine"),
        ("seed: 1\nseed: 2", "`seed` is set twice, on lines 3 and 4."),
        ("report_to: [wandb", "line 3: not valid YAML"),
        ("env: 3", "`env` must be a mapping"),
        ("label_smoothing: 0.7", "label_smoothing=0.7"),
        ("logging_steps: 0", "logging_steps"),
        ("load_in_4bit: true", "Set use_peft=true (QLoRA)"),
        ("test_split_size: 0.1\ndataset_test_split: test", "choose one"),
        ("test_split_size: 1.5", "test_split_size=1.5"),
        ("test_split_size: 5\ndataset_streaming: true", "dataset_streaming=false"),
    ],
)
def test_wrong_lines_get_one_readable_line(recipe_file, line, message):
    told = refused(recipe_file(line))
    assert message in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("optim: adamw_nowhere", "adamw_nowhere"),
        ("load_best_model_at_end: true\neval_strategy: steps\nsave_strategy: epoch\ntest_split_size: 2", "to match"),
        ("bf16: true\nfp16: true\nuse_cpu: true", "At most one of fp16 and bf16"),
        ("warmup_steps: -1", "warmup_steps"),
        ("deepspeed: no_such_file.json", "no_such_file.json"),
        ("lr_scheduler_kwargs: '{broken'", "Expecting property name"),
    ],
)
def test_what_transformers_refuses_is_the_users(recipe_file, lines, message):
    if "deepspeed" in lines:
        pytest.importorskip("deepspeed")
    assert message in refused(recipe_file(lines))


@pytest.mark.parametrize("module", ["torch.distributed.rendezvous", "orpo_dist.config", "transformers.trainer"])
@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug"), ImportError("a bug")])
def test_a_bug_below_the_recipe_goes_up(recipe_file, monkeypatch, module, error):
    def setup(self):
        exec("raise error", {"__name__": module, "error": error})

    monkeypatch.setattr(ORPOConfig, "__post_init__", setup)
    with pytest.raises(type(error)) as caught:
        Recipe.parse([recipe_file("")])
    assert caught.value is error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "fast"], "--learning_rate: 'fast' is not a number."),
        (["--lora-r", "x"], "--lora_r: 'x' is not a whole number."),
        (["--leaning_rate=3"], "Unknown option --leaning_rate. Did you mean `--learning_rate`?"),
        (["--learn", "3"], "Unknown option --learn."),  # no abbreviations: a later field could make them ambiguous
        (["--learning-rate"], "--learning_rate: expected one argument."),
        (["stray"], "'stray' does not belong to an option."),
        (["other.yaml"], "A recipe comes first"),
        (["--nll_scope", "all"], "invalid choice: 'all'"),
    ],
)
def test_wrong_flags_get_one_readable_line(recipe_file, flags, message):
    told = refused(recipe_file(""), *flags)
    assert message in told
    assert "\n" not in told


def test_missing_files_and_fields(tmp_path):
    assert "none.yaml does not exist" in refused(str(tmp_path / "none.yaml"))
    assert "is a folder" in refused(str(tmp_path))
    assert "--config needs the path" in refused("--config")
    assert "dataset_name is missing" in refused("--model_name_or_path", "a/b")
    assert "model_name_or_path is missing" in refused("--dataset_name", "d.jsonl")
    listed = tmp_path / "list.yaml"
    listed.write_text("- a\n- b\n")
    assert "not a list" in refused(str(listed))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refused(str(binary))


def test_yaml_cannot_run_code(tmp_path, recipe_file):
    marker = tmp_path / "ran"
    told = refused(recipe_file(f"run_name: !!python/object/apply:os.system ['touch {marker}']"))
    assert "not valid YAML" in told
    assert not marker.exists()


def test_from_mapping_checks_like_a_file():
    recipe = Recipe.from_mapping({"model_name_or_path": "a/b", "dataset_name": "d", "learning_rate": "1e-5"})
    assert recipe.training.learning_rate == 1e-5
    with pytest.raises(UserError, match="unknown field `learning_rat`"):
        Recipe.from_mapping({"model_name_or_path": "a/b", "dataset_name": "d", "learning_rat": 1})


def test_a_saved_recipe_repeats_the_run(tmp_path, recipe_file):
    text = (
        "use_peft: true\nlora_alpha: 7\nlearning_rate: 1e-5\nlr_scheduler_type: cosine\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\n"
        "eval_strategy: no\nmax_length: null\nadd_eos_token: false\nnll_scope: completion\nreport_to: [tensorboard]\n"
        "gradient_checkpointing: false\nmax_bad_rows: 3\nnum_train_epochs: 1\n"
    )
    first = Recipe.parse([recipe_file(text), "--output_dir", str(tmp_path / "run")])
    first.save(tmp_path / "saved.yaml")
    second = Recipe.parse([str(tmp_path / "saved.yaml")])
    assert second.data == first.data
    assert second.model == first.model
    assert second.to_mapping() == first.to_mapping()
    for name in ("learning_rate", "lr_scheduler_kwargs", "eval_strategy", "add_eos_token", "report_to", "max_bad_rows"):
        assert getattr(second.training, name) == getattr(first.training, name), name
    assert second.training.gradient_checkpointing is False
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert saved["num_train_epochs"] == 1.0
    assert saved["seed"] == 42  # shapes the run, so it is written even where it is the default


def test_max_length_none_survives_saving(tmp_path, recipe_file):
    recipe = Recipe.parse([recipe_file("max_length: null")])
    recipe.save(tmp_path / "saved.yaml")
    assert Recipe.parse([str(tmp_path / "saved.yaml")]).training.max_length is None


def test_no_credential_is_saved(tmp_path, recipe_file, monkeypatch):
    for name in ("HF_TOKEN", "SITE", "WANDB_API_KEY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    text = (
        "hub_token: hf_aaaaaaaaaaaa\nmodel_init_kwargs: {token: hf_bbbbbbbbbbbb, low_cpu_mem_usage: true}\n"
        "env:\n  HF_TOKEN: hf_cccccccccccc\n  WANDB_API_KEY: dddddddddddd\n  SITE: north\n"
        "  HTTPS_PROXY: http://me:eeeeeeee@proxy:80\n"
    )
    recipe = Recipe.parse([recipe_file(text)])
    monkeypatch.undo()
    assert recipe.training.hub_token == "hf_aaaaaaaaaaaa"
    recipe.save(tmp_path / "saved.yaml")
    saved = (tmp_path / "saved.yaml").read_text()
    for secret in ("hf_aaaaaaaaaaaa", "hf_bbbbbbbbbbbb", "hf_cccccccccccc", "dddddddddddd", "eeeeeeee"):
        assert secret not in saved
    assert yaml.safe_load(saved)["env"] == {"SITE": "north"}
    assert yaml.safe_load(saved)["model_init_kwargs"] == {"low_cpu_mem_usage": True}


def test_env_section_is_set_before_the_libraries_are_imported(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{BASE}env:\n  HF_HOME: {tmp_path / 'home'}\n")
    program = (
        "import json, sys; from orpo_dist.recipe.recipe import Recipe; early = 'huggingface_hub' in sys.modules; "
        "Recipe.parse([sys.argv[1]]); from huggingface_hub import constants; "
        "print(json.dumps([early, constants.HF_HOME]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [False, str(tmp_path / "home")]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_this_repository_parse(path):
    recipe = Recipe.parse([str(path)])
    assert recipe.training.output_dir == f"runs/{path.stem}"
    assert recipe.model.trains_adapter == (path.stem not in ("full", "vlm"))


def documented_defaults(text: str) -> dict[str, str]:
    """First two cells of the rows of the tables in docs/config.md."""
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    return {name.strip(" `"): default.strip() for name, default in rows}


def test_the_docs_list_every_field_of_ours_with_its_default():
    documented = documented_defaults((RECIPES.parent / "docs" / "config.md").read_text())
    own = {field.name: field for field in fields(ORPOConfig) if field.name in OWN_OPTIONS}
    own |= {field.name: field for field in fields(DataArguments)}
    shown = {True: "true", False: "false", None: "none"}
    for name, field in own.items():
        is_word = isinstance(field.default, bool) or field.default is None
        assert documented[name] == (shown[field.default] if is_word else str(field.default)), name


def test_torch_dtype_is_dtype(tmp_path):
    """In a file and as a flag, where recipes of other trainers have it."""
    file = tmp_path / "r.yaml"
    file.write_text("dataset_name: d\nmodel_name_or_path: m\nuse_peft: true\ntorch_dtype: bfloat16\n")
    assert Recipe.parse([str(file)]).model.dtype == "bfloat16"
    for flags in (["--torch_dtype", "float32"], ["--torch-dtype=float32"]):
        assert Recipe.parse([str(file), *flags]).model.dtype == "float32"
    file.write_text("dataset_name: d\nmodel_name_or_path: m\ntorch_dtype: bfloat16\ndtype: float32\n")
    with pytest.raises(UserError, match="same option"):
        Recipe.parse([str(file)])
    file.write_text("dataset_name: d\nmodel_name_or_path: m\ntorch_dtype: bfloat61\n")
    with pytest.raises(UserError, match=r"line 3.*`dtype` is 'bfloat61'"):
        Recipe.parse([str(file)])
