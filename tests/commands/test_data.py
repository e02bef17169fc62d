import json

import pytest
from datasets import Dataset
from transformers import LlamaConfig, T5Config

from orpo_dist.cli import main
from orpo_dist.commands.data import _options, _parser
from orpo_dist.options.data import PrepareOptions
from orpo_dist.recipe.recipe import Recipe

GOOD = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*GOOD, {**GOOD[0], "chosen": ""}]))
    return path


@pytest.fixture(scope="module")
def model(plain_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    plain_tokenizer.save_pretrained(folder)
    LlamaConfig().save_pretrained(folder)
    return str(folder)


def test_check(data, tmp_path, capsys):
    assert main(["data", "check", str(data), "--dropped-rows", str(tmp_path / "bad.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "prompt in `prompt`, text, `chosen` over `rejected`" in out
    assert "41 rows, 40 usable, 1 bad" in out
    assert f"1 x empty completion\n    {data}, row 41, column `chosen`: no text" in out
    read = out[out.index("Read of") :]
    assert f"split train: 41 rows from 1 file.\n  {data}: 41 rows\n  prompt: column `prompt`, by its name" in read
    (line,) = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 41


def test_unusable_data_ends_with_code_2(data, capsys):
    assert main(["data", "check", str(data), "--max_bad_rows", "0"]) == 2
    captured = capsys.readouterr()
    assert "1 of 41 rows are bad, more than max_bad_rows=0 allows" in captured.err
    assert "Traceback" not in captured.err
    assert main(["data", "check", str(data.with_name("missing.jsonl"))]) == 2
    assert main(["data", "check", str(data), "--chosen-column", "good"]) == 2


def test_check_with_a_tokenizer(data, model, capsys):
    assert main(["data", "check", str(data), "--model", model]) == 0
    out = capsys.readouterr().out
    assert "41 rows, 40 pairs kept, 1 dropped (1 empty completion)" in out
    assert f"  {data}: 41 rows\n  prompt: column `prompt`, by its name; the first 41 rows hold text" in out
    assert main(["data", "check", str(data), "--model", model, "--max_length", "4"]) == 2
    assert "Set max_prompt_length to cut long prompts, or raise max_length" in capsys.readouterr().err


def test_stats(data, model, capsys):
    assert main(["data", "stats", str(data), "--model", model, "--batch-size", "8"]) == 0
    out = capsys.readouterr().out
    for part in (
        "40 pairs, lengths in tokens",
        "prompt ",
        "rejected ",
        "batches of 8 pairs",
        "(2P+C+R) / (P+C+R)",
        "###",
    ):
        assert part in out
    assert main(["data", "stats", str(data)]) == 2
    assert "--model" in capsys.readouterr().err


def test_stats_of_an_encoder_decoder_model(data, plain_tokenizer, tmp_path, capsys):
    plain_tokenizer.save_pretrained(tmp_path / "t5")
    T5Config().save_pretrained(tmp_path / "t5")
    assert main(["data", "stats", str(data), "--model", str(tmp_path / "t5")]) == 0
    assert "40 pairs" in capsys.readouterr().out


def options(*argv: str) -> PrepareOptions:
    return _options(_parser().parse_args(list(argv)))


def test_flags_become_options():
    assert options("check", "x") == PrepareOptions()
    assert options("stats", "x") == PrepareOptions(max_length=None)
    given = options(
        "check", "x", "--max-length", "none", "--max_prompt_length", "5", "--max_bad_rows", "0.5", "--add-eos-token",
        "false", "--apply_chat_template", "True", "--prompt_column", "q", "--chat_template", "chatml",
        "--image-column", "photo", "--image_folder", "photos", "--allow-image-urls", "true",
        "--allow_outside_image_folder", "true",
    )  # fmt: skip
    assert given == PrepareOptions(
        max_length=None,
        max_prompt_length=5,
        max_bad_rows=0.5,
        add_eos_token=False,
        apply_chat_template=True,
        prompt_column="q",
        chat_template="chatml",
        image_column="photo",
        image_folder="photos",
        allow_image_urls=True,
        allow_outside_image_folder=True,
    )


def test_a_flag_of_the_wrong_type(data, capsys):
    assert main(["data", "check", str(data), "--max_length", "long"]) == 2
    assert "--max_length long: expected int or None" in capsys.readouterr().err.replace("  ", " ")


def test_dataset_num_proc_reaches_the_tokenisation(data, model, monkeypatch):
    asked, original = [], Dataset.map

    def spy(self, *args, **kwargs):
        asked.append(kwargs.get("num_proc"))
        return original(self, *args, **kwargs | {"num_proc": None})

    monkeypatch.setattr(Dataset, "map", spy)
    monkeypatch.setenv("ORPO_DIST_CACHE", str(data.parent / "cache"))
    assert main(["data", "stats", str(data), "--model", model, "--dataset_num_proc", "2"]) == 0
    assert 2 in asked


def test_processor_kwargs_reach_the_processor(data, model, capsys):
    assert main(["data", "stats", str(data), "--model", model, "--processor_kwargs", '{"max_patches": 9}']) == 2
    assert "max_patches: the model has no image processor" in capsys.readouterr().err
    assert main(["data", "stats", str(data), "--model", model, "--processor_kwargs", "{"]) == 2
    assert "expected a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--max_len", "--max_lenght"])
def test_an_unknown_or_abbreviated_flag(data, flag, capsys):
    assert main(["data", "check", str(data), flag, "5"]) == 2
    assert f"Unknown option {flag}. Did you mean --max" in capsys.readouterr().err


def test_a_value_outside_the_choices(data, capsys):
    assert main(["data", "check", str(data), "--on_bad_row", "keep"]) == 2
    assert "on_bad_row" in capsys.readouterr().err


def test_types_of_flags_survive_a_parsed_recipe():
    """HfArgumentParser writes simplified types into the fields that it parses."""
    Recipe.from_mapping({"dataset_name": "d", "model_name_or_path": "m"})
    assert options("check", "x", "--max_length", "none").max_length is None


def test_a_stray_word(data, capsys):
    assert main(["data", "check", str(data), "more.jsonl"]) == 2
    assert "'more.jsonl' does not belong to an option" in capsys.readouterr().err


def test_help_says_that_stats_has_no_bound(capsys):
    assert main(["data", "--help"]) == 0
    assert "`data stats` has no bound" in " ".join(capsys.readouterr().out.split())
