import json
import random
from dataclasses import replace

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from orpo_dist.config import ORPOConfig
from orpo_dist.data import prepare, streaming
from orpo_dist.data.prepare import CONTEXT_COLUMNS, TOKEN_COLUMNS, DroppedRow, prepare_pairs
from orpo_dist.data.sources import load_rows
from orpo_dist.errors import UserError
from orpo_dist.options.data import PrepareOptions

ROWS = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
EMPTY = {"prompt": "question", "chosen": "", "rejected": "bad"}
CHAT = [
    {
        "chosen": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "no"}],
    }
    for i in range(4)
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """The folders that are built, not taken from the cache."""
    folders = []
    real = prepare._build

    def build(folder, *arguments):
        folders.append(folder.name)
        real(folder, *arguments)

    monkeypatch.setattr(prepare, "_build", build)
    return folders


def stream(rows=ROWS) -> IterableDataset:
    def generate():
        yield from rows

    return IterableDataset.from_generator(generate)


def test_the_data_set_a_trainer_gets(plain_tokenizer):
    prepared = prepare_pairs(ROWS, plain_tokenizer, PrepareOptions())
    assert prepared.dataset.column_names == [*TOKEN_COLUMNS, *CONTEXT_COLUMNS, "row"]
    assert (prepared.rows, prepared.dropped, len(prepared.dataset)) == (10, [], 10)
    assert prepared.format == "prompt in `prompt`, text, `chosen` over `rejected`, no chat template"
    row = prepared.dataset[3]
    assert row["row"] == 3
    assert plain_tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == "<s>question 3good 3</s>"
    assert plain_tokenizer.decode(row["prompt_ids"] + row["rejected_ids"]) == "<s>question 3bad 3</s>"


@pytest.mark.parametrize("kind", ["list", "dataset", "stream", "file", "stream of a file", "processes"])
def test_every_source_gives_the_same_tokens(plain_tokenizer, tmp_path, capsys, kind):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = {
        "list": lambda: ROWS,
        "dataset": lambda: Dataset.from_list(ROWS),
        "stream": stream,
        "file": lambda: load_rows(str(path)),
        "stream of a file": lambda: load_rows(str(path), streaming=True),
        "processes": lambda: Dataset.from_list(ROWS),
    }[kind]()
    options = PrepareOptions(dataset_num_proc=2 if kind == "processes" else None)
    dataset = prepare_pairs(rows, plain_tokenizer, options).dataset
    expected = prepare_pairs(ROWS, plain_tokenizer, PrepareOptions()).dataset
    assert dataset.select_columns(TOKEN_COLUMNS)[:] == expected.select_columns(TOKEN_COLUMNS)[:]
    assert dataset["row"][0] == (1 if "file" in kind else 0)
    assert ("a streaming data set" in capsys.readouterr().out) == ("stream" in kind)


def test_messages(chat_tokenizer):
    prepared = prepare_pairs(CHAT, chat_tokenizer, PrepareOptions())
    assert prepared.format.startswith("implicit prompt (the common beginning), messages")
    row = prepared.dataset[0]
    assert chat_tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\nQ0<|im_end|>\n<|im_start|>assistant\n"
    assert chat_tokenizer.decode(row["chosen_ids"]) == "yes<|im_end|>\n"


def test_dropped_rows_are_reported(plain_tokenizer, tmp_path, capsys):
    report = tmp_path / "run" / "dropped_rows.jsonl"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:4], EMPTY, *ROWS[4:]]))
    prepared = prepare_pairs(
        load_rows(str(path)), plain_tokenizer, PrepareOptions(max_bad_rows=0.2), dropped_rows_path=report
    )
    assert prepared.dropped == [DroppedRow(str(path), 5, "chosen", "empty completion", "no text")]
    assert prepared.dataset["row"][:] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert json.loads(report.read_text())["source"] == str(path)
    assert "train: 11 rows, 10 pairs kept, 1 dropped (1 empty completion)" in capsys.readouterr().out


def test_rows_without_a_file_are_named_after_the_data_set(plain_tokenizer):
    prepared = prepare_pairs([*ROWS, EMPTY], plain_tokenizer, PrepareOptions(max_bad_rows=1), name="eval")
    assert prepared.dropped == [DroppedRow("eval", 10, "chosen", "empty completion", "no text")]


def test_too_many_bad_rows_are_still_listed(plain_tokenizer, tmp_path):
    report = tmp_path / "dropped_rows.jsonl"
    with pytest.raises(UserError, match="1 of 11 rows are bad"):
        prepare_pairs([*ROWS, EMPTY], plain_tokenizer, PrepareOptions(), dropped_rows_path=report)
    assert len(report.read_text().splitlines()) == 1


@pytest.mark.parametrize("cached", [False, True])
def test_error_policy(plain_tokenizer, cached):
    rows = [*ROWS, {**EMPTY, "prompt": "other"}]
    if cached:
        prepare_pairs(rows, plain_tokenizer, PrepareOptions(max_bad_rows=0.5))
    with pytest.raises(UserError, match=r"train, row 10, column `chosen`: no text \(empty completion\)"):
        prepare_pairs(rows, plain_tokenizer, PrepareOptions(on_bad_row="error"))


def test_counts_of_what_was_cut(plain_tokenizer):
    rows = [*ROWS, {"prompt": "one two three four five", "chosen": "a " * 30, "rejected": "b " * 30}]
    prepared = prepare_pairs(rows, plain_tokenizer, PrepareOptions(max_length=24, max_prompt_length=4))
    assert prepared.truncated_prompts == sum(len(ids) == 4 for ids in prepared.dataset["prompt_ids"])
    assert prepared.truncated_completions == 2


def test_no_pair_is_longer_than_max_length(plain_tokenizer):
    words = random.Random(0)

    def text() -> str:
        return " ".join(words.choices(["one", "two", "three", "river", "lazy dog", "x"], k=words.randint(1, 40)))

    rows = [{name: text() for name in ("prompt", "chosen", "rejected")} for _ in range(50)]
    options = PrepareOptions(max_length=40, max_prompt_length=30, max_completion_length=25)
    for row in prepare_pairs(rows, plain_tokenizer, options).dataset:
        for completion in (row["chosen_ids"], row["rejected_ids"]):
            assert 1 <= len(completion) <= 25 and len(row["prompt_ids"]) + len(completion) <= 40


# -- the cache --


def test_equal_content_is_not_tokenised_again(plain_tokenizer, built):
    first = prepare_pairs(ROWS, plain_tokenizer, PrepareOptions())
    again = prepare_pairs(Dataset.from_list(ROWS), plain_tokenizer, PrepareOptions(max_bad_rows=3, dataset_num_proc=2))
    assert len(built) == 1
    assert first.dataset[:] == again.dataset[:]
    assert prepare_pairs(stream(), plain_tokenizer, PrepareOptions()).dataset[:] == first.dataset[:]
    stream_builds = len(built)
    prepare_pairs(stream(), plain_tokenizer, PrepareOptions())
    assert len(built) == stream_builds


@pytest.mark.parametrize(
    "change",
    [{"max_length": 99}, {"add_eos_token": False}, {"truncation_side": "right"}, {"apply_chat_template": True}],
)
def test_other_options_are_another_content(chat_tokenizer, built, change):
    prepare_pairs(ROWS, chat_tokenizer, PrepareOptions())
    prepare_pairs(ROWS, chat_tokenizer, PrepareOptions(**change))
    assert len(built) == 2


def test_other_rows_tokenizers_and_templates_are_another_content(chat_tokenizer, plain_tokenizer, built, tmp_path):
    prepare_pairs(CHAT, chat_tokenizer, PrepareOptions())
    prepare_pairs(CHAT[:3], chat_tokenizer, PrepareOptions())
    template = tmp_path / "template.jinja"
    template.write_text(chat_tokenizer.chat_template)
    prepare_pairs(CHAT, chat_tokenizer, PrepareOptions(chat_template=str(template)))
    assert len(built) == 2  # the same template under another name
    template.write_text("{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}")
    prepare_pairs(CHAT, chat_tokenizer, PrepareOptions(chat_template=str(template)))
    prepare_pairs(CHAT, plain_tokenizer, PrepareOptions(chat_template=str(template)))
    assert len(built) == 4


def test_a_broken_run_leaves_no_half_written_cache(plain_tokenizer, cache, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_build", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare_pairs(ROWS, plain_tokenizer, PrepareOptions())
    assert list(cache.iterdir()) == []
    assert len(prepare_pairs(ROWS, plain_tokenizer, PrepareOptions()).dataset) == 10
    (folder,) = cache.iterdir()
    names = {".sizes.json", "dropped.jsonl", "pairs.arrow", "report.json"}
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize("processes", [None, 2])
def test_rows_in_many_parts_are_those_of_one(chat_tokenizer, tmp_path, monkeypatch, processes):
    """Row numbers, bad rows and notes too."""
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"question {i} " * (i % 7), "chosen": "yes" * (i % 5), "rejected": f"no {i}"} for i in range(900)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PrepareOptions(max_bad_rows=500, max_prompt_length=5, truncation_side="right", dataset_num_proc=processes)
    whole = prepare_pairs(load_rows(str(file)), chat_tokenizer, options, name="all")
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(streaming, "PART_BYTES", 1)
    monkeypatch.setattr(streaming, "READ_ROWS", 250)
    parts = prepare_pairs(load_rows(str(file)), chat_tokenizer, options, name="all")
    assert parts.dataset[:] == whole.dataset[:]
    assert replace(parts, dataset=whole.dataset) == whole
    assert [row.row for row in parts.dropped] == list(range(1, 901, 5))
    (note,) = parts.notes
    # row 1 is bad
    assert (note.kind, note.source, note.row, note.rows) == ("prompt cut", str(file), 2, parts.truncated_prompts)


# -- what is given --


def test_token_ids_are_passed_through(plain_tokenizer):
    dataset = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}])
    prepared = prepare_pairs(dataset, plain_tokenizer, PrepareOptions())
    assert prepared.dataset is dataset and prepared.rows == 1


def test_a_dataset_dict_is_refused(plain_tokenizer):
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)})
    with pytest.raises(UserError, match="a DatasetDict with the splits train, test"):
        prepare_pairs(splits, plain_tokenizer, PrepareOptions())


@pytest.mark.parametrize("rows", [[], Dataset.from_dict({"chosen": []}), stream([])], ids=["list", "dataset", "stream"])
def test_no_rows(plain_tokenizer, rows):
    with pytest.raises(UserError, match="data set has no rows"):
        prepare_pairs(rows, plain_tokenizer, PrepareOptions())


def test_options_from_a_config(tmp_path):
    config = ORPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_length=77,
        max_prompt_length=9,
        dataset_num_proc=3,
        system_column="s",
    )
    options = config.prepare_options(is_encoder_decoder=False)
    assert options == PrepareOptions(max_length=77, max_prompt_length=9, dataset_num_proc=3, system_column="s")
    assert config.prepare_options(is_encoder_decoder=True).max_completion_length == 128


# -- real data --


@pytest.fixture
def demo(shared_data):
    return load_rows(str(shared_data / "dpo_en_demo.json"))


def test_real_pairs_stop_with_the_option_that_keeps_them(demo, smollm2_tokenizer):
    with pytest.raises(UserError) as caught:
        prepare_pairs(demo, smollm2_tokenizer, PrepareOptions())
    assert "43 of 300 rows are bad, more than max_bad_rows=0.05 (15 rows)" in str(caught.value)
    assert "Set max_prompt_length" in str(caught.value)
    with pytest.raises(UserError, match="42 of 300 rows"):  # SmolLM2's own template adds a system message
        prepare_pairs(demo, smollm2_tokenizer, PrepareOptions(chat_template="chatml"))


def test_real_pairs_are_kept_with_max_prompt_length(demo, smollm2_tokenizer):
    prepared = prepare_pairs(demo, smollm2_tokenizer, PrepareOptions(max_prompt_length=512))
    assert len(prepared.dataset) == 300 and prepared.dropped == []
    eos = smollm2_tokenizer.eos_token_id
    for row in prepared.dataset:
        for completion in (row["chosen_ids"], row["rejected_ids"]):
            assert len(row["prompt_ids"]) + len(completion) <= 1024
            assert completion.count(eos) <= 1
        assert row["prompt_ids"][0] == smollm2_tokenizer.bos_token_id != row["prompt_ids"][1]


def test_rewording_a_format_keeps_the_cache(plain_tokenizer, monkeypatch):
    from orpo_dist.data import prepare

    built, original = [], prepare.built_once

    def spy(name, build):
        built.append(name)
        return original(name, build)

    monkeypatch.setattr(prepare, "built_once", spy)
    prepare_pairs(ROWS, plain_tokenizer, PrepareOptions())
    detect = prepare.detect_format
    monkeypatch.setattr(prepare, "detect_format", lambda *args: replace(detect(*args), description="other words"))
    prepare_pairs(ROWS, plain_tokenizer, PrepareOptions())
    names = [name for name in built if name.startswith("pairs-")]
    assert len(names) == 2 and names[0] == names[1]


def test_notes_of_rows_are_counted_with_the_first_of_them(chat_tokenizer, capsys):
    thought = {"role": "assistant", "content": "<think>Greet.</think>Hello"}
    turns = [{"role": "user", "content": "Hi"}, thought, {"role": "user", "content": "And?"}]
    replies = {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}
    rows = [{"prompt": turns[:1], **replies}, {"prompt": turns, **replies}, {"prompt": turns, **replies}]
    template = "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}|{% endfor %}"
    prepared = prepare_pairs(rows, chat_tokenizer, PrepareOptions(chat_template=template))
    (note,) = prepared.notes
    assert (note.rows, note.row) == (2, 1)
    assert "train: 2 rows: the chat template leaves out the reasoning of earlier answers (first: train, row 1)" in (
        capsys.readouterr().out
    )
