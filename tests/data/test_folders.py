"""The files of each split of a folder: what `datasets` finds, and what it would not find."""

import json

import pytest
from datasets import load_dataset_builder

from orpo_dist.data.folders import split_files
from orpo_dist.data.sources import load_rows
from orpo_dist.errors import UserError


def names(folder, split):
    return [path.relative_to(folder).as_posix() for path in split_files(folder, split).files]


def test_files_of_a_split(tmp_path):
    for name in (
        "train-00001-of-00002.parquet",
        "train-00000-of-00002.parquet",
        "valid.jsonl",
        "test/a.csv",
        ".x.json",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert names(tmp_path, "train") == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert names(tmp_path, "validation") == ["valid.jsonl"]
    assert names(tmp_path, "test") == ["test/a.csv"]
    with pytest.raises(UserError, match=r"no files of split `other`\. Splits found: test, train, validation"):
        split_files(tmp_path, "other")


def test_files_without_split_are_for_training(tmp_path):
    for name in ("b.jsonl", "a.json", "notes.md"):
        (tmp_path / name).touch()
    assert names(tmp_path, "train") == ["a.json", "b.jsonl"]
    with pytest.raises(UserError, match="no files of split `test`"):
        split_files(tmp_path, "test")


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no data files in it"):
        split_files(tmp_path, "train")


# -- as `datasets` --

LAYOUTS = {
    "sharded": [
        "data/train_prefs-00000-of-00001.jsonl",
        "data/train_sft-00000-of-00001.jsonl",
        "data/test-00000-of-00001.jsonl",
    ],
    "sharded in the root": ["train_prefs-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl"],
    "words in names": ["ultra-train.jsonl", "my_dev_2024.jsonl", "part 1 test.jsonl", "contest.jsonl", "trainer.jsonl"],
    "eval is test": ["train.jsonl", "eval.jsonl"],
    "other words": ["training.jsonl", "val-1.jsonl", "val-2.jsonl", "testing.jsonl"],
    "folders": ["train/a.jsonl", "train/deep/b.jsonl", "my-validation-set/a.jsonl", "evaluation_2/c.jsonl"],
    "folders below others": ["raw/train_v2/a.jsonl", "raw/test/a.jsonl"],
    "none named": ["b.jsonl", "a.jsonl", "sub/c.jsonl"],
    "metadata": [
        "a.jsonl",
        "dataset_infos.json",
        "dataset_info.json",
        "config.json",
        ".hidden.jsonl",
        "__MACOSX/a.jsonl",
    ],
    "sub-folders with names of splits": ["train/test.jsonl", "train/train.jsonl"],
    "upper case": ["Train.jsonl", "TEST.jsonl"],
}


def touch(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")


def of_datasets(folder, config=None) -> dict[str, list[str]]:
    data_files = load_dataset_builder(str(folder), config, cache_dir=str(folder.parent / "cache")).config.data_files
    return {str(split): sorted(map(str, files)) for split, files in data_files.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_splits_are_those_of_datasets(layout, tmp_path):
    folder = tmp_path / "data set [v1]" if layout == "folders" else tmp_path / "set"
    touch(tmp_path / "set", LAYOUTS[layout])
    theirs = of_datasets(tmp_path / "set")
    (tmp_path / "set").rename(folder)
    assert theirs
    for split, files in theirs.items():
        ours = split_files(folder, split).files
        assert sorted(str(path).replace(str(folder), str(tmp_path / "set")) for path in ours) == files


def card(folder, *configs):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text("---\nconfigs: " + json.dumps(configs) + "\n---\n# Data\n")


def test_the_card_names_the_splits(tmp_path):
    folder = tmp_path / "set"
    card(
        folder,
        {
            "config_name": "a",
            "data_files": [{"split": "train", "path": ["x/*.jsonl", "z.jsonl"]}, {"split": "dev", "path": "y.jsonl"}],
        },
        {"config_name": "b", "data_files": "y.jsonl", "default": True},
        {"config_name": "c", "data_dir": "x"},
    )
    touch(folder, ["x/2.jsonl", "x/1.jsonl", "y.jsonl", "z.jsonl", "train.jsonl"])
    for config in (None, "a", "b", "c"):
        for split, files in of_datasets(folder, config).items():
            assert sorted(map(str, split_files(folder, split, config).files)) == files
    assert names(folder, "train") == ["y.jsonl"]
    assert split_files(folder, "validation", "a").name == "dev"
    with pytest.raises(UserError, match=r"no files of split `test`\. Splits found: dev, train"):
        split_files(folder, "test", "a")
    with pytest.raises(UserError, match=r"no configuration `d` in its card\. Configurations: a, b, c"):
        split_files(folder, "train", "d")
    assert [row["_source"] for row in load_rows(str(folder), split="a:dev")] == [str(folder / "y.jsonl")]


@pytest.mark.parametrize(
    "configs, message",
    [
        ([{"config_name": "a", "data_files": "a"}, {"config_name": "b"}], "several configurations and no default"),
        ([{"config_name": "a", "data_files": "gone.jsonl"}], "its card's data_files: Unable to find"),
        ([{"config_name": "a", "data_files": "gone/*"}], "no data files match gone/\\*"),
        ([{"config_name": "a", "data_files": "https://example.org/a.jsonl"}], "only files on this disk"),
        ([{"config_name": "a", "data_files": 7}], "its card: .*Expected data_files in YAML"),
        ([{"data_files": "a.jsonl"}], "its card: Each config must include `config_name`"),
    ],
)
def test_cards_that_cannot_be_followed(tmp_path, configs, message):
    card(tmp_path, *configs)
    touch(tmp_path, ["a.jsonl"])
    with pytest.raises(UserError, match=f"(?s){message}"):
        split_files(tmp_path, "train")


def test_a_split_of_another_configuration_is_not_read(tmp_path):
    card(tmp_path, {"config_name": "en", "data_dir": "en"}, {"config_name": "fr", "data_dir": "fr"})
    for name in ("en/train.jsonl", "fr/train.jsonl", "fr/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert split_files(tmp_path, "test", "fr").files == [tmp_path / "fr/test.jsonl"]
    with pytest.raises(UserError, match=r"no files of split `test`\. Splits found: train"):
        split_files(tmp_path, "test", "en")


def test_a_card_that_is_no_yaml(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    touch(tmp_path, ["a.jsonl"])
    with pytest.raises(UserError, match="not a readable card"):
        split_files(tmp_path, "train")


def test_parameters_of_the_card_that_are_not_used_are_named(tmp_path):
    card(tmp_path, {"config_name": "default", "data_files": "a.csv", "sep": ";"})
    touch(tmp_path, ["a.csv"])
    assert split_files(tmp_path, "train").notes == [f"{tmp_path}: not used of its card's configuration `default`: sep."]


# -- words for a split --


@pytest.mark.parametrize(
    "files, split, found",
    [
        (["train.jsonl", "dev.jsonl"], "valid", "validation"),
        (["train.jsonl", "valid.jsonl"], "eval", "validation"),
        (["train.jsonl", "validation.jsonl", "eval.jsonl"], "eval", "test"),  # datasets' word for files named eval
        (["train.jsonl", "validation.jsonl", "test.jsonl"], "evaluation", "validation"),
        (["train.jsonl", "test.jsonl"], "eval", "test"),
        (["train.jsonl", "test.jsonl"], "testing", "test"),
        (["training.jsonl", "test.jsonl"], "training", "train"),
        (["train.jsonl", "test.jsonl"], "val", None),
        (["train.jsonl", "validation.jsonl"], "test", None),
    ],
)
def test_other_words_for_a_split(tmp_path, files, split, found):
    touch(tmp_path, files)
    if found is None:
        with pytest.raises(UserError, match="no files of split"):
            split_files(tmp_path, split)
    else:
        resolved = split_files(tmp_path, split)
        assert resolved.name == found
        assert (f"{tmp_path}: the split `{split}` is `{found}` there." in resolved.notes) == (found != split)


def test_a_split_by_its_own_name_where_datasets_knows_none(tmp_path):
    touch(
        tmp_path,
        ["train_prefs-00000-of-00002.jsonl", "train_prefs-00001-of-00002.jsonl", "prefs/b.jsonl", "gold.jsonl"],
    )
    touch(tmp_path, ["__pycache__/gold.jsonl"])
    assert names(tmp_path, "gold") == ["gold.jsonl"]
    assert names(tmp_path, "prefs") == ["prefs/b.jsonl"]


def test_what_is_not_read_or_read_twice_is_named(tmp_path):
    touch(tmp_path, ["train.csv", "train_info.json", "train-test.csv", "more-train.jsonl.zst", "photos/train.png"])
    found = split_files(tmp_path, "train")
    assert [path.name for path in found.files] == ["train-test.csv", "train.csv"]
    assert "in both of the splits `train` and `test`: train-test.csv" in found.notes[1]
    assert "not read, a packing that is not supported: more-train.jsonl.zst" in found.notes[0]
    assert "not read, JSON beside data files of another format: train_info.json" in found.notes[2]


def test_what_is_told_reaches_the_terminal(tmp_path, capsys):
    touch(tmp_path, ["train.jsonl", "dev.jsonl"])
    (tmp_path / "dev.jsonl").write_text('{"prompt": "p"}\n')
    assert load_rows(str(tmp_path), split="eval")["prompt"][:] == ["p"]
    assert "the split `eval` is `validation` there" in capsys.readouterr().out
