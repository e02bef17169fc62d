import json
import tracemalloc

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetNotFoundError

from orpo_dist.data import sources
from orpo_dist.data.messages import decode
from orpo_dist.data.sources import load_rows
from orpo_dist.errors import UserError

ROWS = [{"prompt": f"p{i}", "chosen": "42", "rejected": str(i)} for i in range(20)]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_file_with_where_its_rows_came_from(jsonl):
    rows = load_rows(str(jsonl))
    assert isinstance(rows, Dataset)
    assert rows[3] == {**ROWS[3], "_source": str(jsonl), "_row": 4}


def test_a_changed_file_is_read_again(jsonl):
    assert load_rows(str(jsonl))[0]["chosen"] == "42"
    jsonl.write_text(jsonl.read_text().replace("42", "43"))
    assert load_rows(str(jsonl))[0]["chosen"] == "43"


def test_a_file_is_not_held_in_memory_for_its_name(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "p", "chosen": "c" * 1000, "rejected": "r"}) + "\n" for _ in range(40_000))
    )
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "cache"))
    load_rows(str(path))
    tracemalloc.start()
    sources.digest(sources._contents([path]))
    name_peak = tracemalloc.get_traced_memory()[1]
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "other"))
    load_rows(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(name_peak, peak) < 34 << 20 < path.stat().st_size, (name_peak, peak)


def test_formats_of_rows_survive(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"chosen": "42"}, {"chosen": 42}, {"chosen": [{"role": "assistant", "content": "x"}]}]
    path.write_text(json.dumps(rows))
    assert [decode(row["chosen"]) for row in load_rows(str(path))] == [row["chosen"] for row in rows]


def test_a_folder_of_several_formats(tmp_path):
    (tmp_path / "train_a.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "train_b.csv").write_text("prompt,chosen,rejected\np1,42,1\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[2]))
    rows = load_rows(str(tmp_path))
    assert [row["prompt"] for row in rows] == ["p0", "p1"]
    assert [row["_row"] for row in rows] == [1, 1]
    assert load_rows(str(tmp_path), split="test")["prompt"][:] == ["p2"]


def test_save_to_disk_folders(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(str(tmp_path / "splits"))
    assert len(load_rows(str(tmp_path / "one"))) == 20
    assert len(load_rows(str(tmp_path / "splits"), split="test")) == 3
    with pytest.raises(UserError, match=r"no split `dev`\. Splits found: train, test"):
        load_rows(str(tmp_path / "splits"), split="dev")


def test_another_word_for_a_split(tmp_path, jsonl, capsys):
    DatasetDict({"train": Dataset.from_list(ROWS), "valid": Dataset.from_list(ROWS[:3])}).save_to_disk(tmp_path / "set")
    assert len(load_rows(str(tmp_path / "set"), split="dev")) == 3
    assert "the split `dev` is `valid` there" in capsys.readouterr().out
    assert len(load_rows(str(jsonl), split="test")) == 20
    assert "all of its rows are read as the split `test`" in capsys.readouterr().out


def test_max_samples_and_slices(jsonl):
    assert len(load_rows(str(jsonl), max_samples=5)) == 5
    assert len(load_rows(str(jsonl), max_samples=500)) == 20
    assert load_rows(str(jsonl), split="train[10%:20%]")["prompt"][:] == ["p2", "p3"]
    assert load_rows(str(jsonl), split="train[-2:]")["prompt"][:] == ["p18", "p19"]
    with pytest.raises(UserError, match="not a slice"):
        load_rows(str(jsonl), split="train[a:b]")
    with pytest.raises(UserError, match="leaves no rows"):
        load_rows(str(jsonl), max_samples=0)


def test_streaming_a_file(jsonl):
    rows = load_rows(str(jsonl), streaming=True, max_samples=3)
    assert isinstance(rows, IterableDataset)
    assert [row["_row"] for row in rows] == [1, 2, 3]


def test_nothing_there(tmp_path):
    for name in (str(tmp_path / "missing.jsonl"), "missing.csv", "a/b/c"):
        with pytest.raises(UserError, match="no such file or folder"):
            load_rows(name)
    with pytest.raises(UserError, match="is for data sets of the hub"):
        load_rows(str(tmp_path), config="x")


# -- the hub, of which this machine has none: what is asked of `datasets`, and what becomes of its errors --


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, streaming, token):
        calls.append((name, config, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    "arguments, call",
    [
        ({"path_or_name": "owner/name"}, ("owner/name", None, "train")),
        ({"path_or_name": "owner/name:conf"}, ("owner/name", "conf", "train")),
        ({"path_or_name": "name", "split": "conf:test"}, ("name", "conf", "test")),
        ({"path_or_name": "name", "split": "train[1:3]"}, ("name", None, "train[1:3]")),
        ({"path_or_name": "name:conf", "split": "conf:test", "config": "conf"}, ("name", "conf", "test")),
    ],
)
def test_names_configurations_and_splits(hub, arguments, call):
    assert len(load_rows(**arguments)) == 20
    assert hub == [call]


def test_another_word_for_a_split_of_the_hub(monkeypatch, capsys):
    def load_dataset(name, config, *, split, streaming, token):
        if split != "validation":
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'validation'].")
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    assert len(load_rows("a/b", split="dev")) == 20
    assert "a/b: the split `dev` is `validation` there" in capsys.readouterr().out
    with pytest.raises(UserError, match="Unknown split"):
        load_rows("a/b", split="test")


def test_contradicting_configurations(hub):
    with pytest.raises(UserError, match="several configurations named at once: a, b"):
        load_rows("name:a", split="b:train")


@pytest.mark.parametrize(
    "error, message",
    [
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "no data set of that name on the hub"),
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "Accept its terms on .*datasets/a/b"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), "the hub cannot be reached"),
        (ValueError("Unknown split \"dev\". Should be one of ['train']."), "Unknown split"),
        (RuntimeError("Dataset scripts are no longer supported"), "comes as Python code"),
    ],
)
def test_hub_errors(monkeypatch, error, message):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "get_dataset_config_names", load_dataset)
    with pytest.raises(UserError, match=message):
        load_rows("a/b")


def test_gated_repository(monkeypatch):
    def load_dataset(*_, **__):
        raise sources.GatedRepoError.__new__(sources.GatedRepoError)  # its __init__ wants a response of the hub

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="hf auth login"):
        load_rows("a/b")


def test_offline_without_cache():
    """The real library, with HF_HUB_OFFLINE=1 as in all tests."""
    with pytest.raises(UserError, match="the hub cannot be reached"):
        load_rows("nobody/nothing")
