"""Rows with images as people store them: every spelling gives the same prompt, images and token ids."""

import base64
import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Image, IterableDataset, List
from PIL import Image as pillow

from orpo_dist.data import prepare
from orpo_dist.data.detect import detect_format
from orpo_dist.data.pairs import Pair
from orpo_dist.data.prepare import CONTEXT_COLUMNS, IMAGE_COLUMNS, TOKEN_COLUMNS, prepare_pairs
from orpo_dist.data.sources import load_rows
from orpo_dist.errors import BadRow, UserError
from orpo_dist.images.decode import open_image
from orpo_dist.options.data import PrepareOptions
from tests.data.processors import qwen_processor
from tests.model.tiny_vlms import drawing

IMAGE = {"type": "image"}
QUESTION = {"type": "text", "text": "What is it?"}
USER = {"role": "user", "content": [IMAGE, QUESTION]}
CHOSEN, REJECTED = [{"role": "assistant", "content": "Paris"}], [{"role": "assistant", "content": "The river"}]
PICTURE = drawing(64, 96, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """images/a.png: the picture as a file."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    PICTURE.save(tmp_path / "data" / "images" / "a.png")
    return tmp_path / "data"


def png() -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    return buffer.getvalue()


DATA_URL = "data:image/png;base64," + base64.b64encode(png()).decode()
TRL = {"images": ["images/a.png"], "prompt": [USER], "chosen": CHOSEN, "rejected": REJECTED}


def openai(part: dict) -> dict:
    prompt = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    return {"prompt": prompt, "chosen": CHOSEN, "rejected": REJECTED}


SPELLINGS = {
    "TRL": TRL,
    "TRL, one image": {**TRL, "image": "images/a.png", "images": None},
    "TRL, no placeholder": {**TRL, "prompt": [{"role": "user", "content": "What is it?"}]},
    "TRL, whole conversations": {
        "images": ["images/a.png"],
        "chosen": [USER, *CHOSEN],
        "rejected": [USER, *REJECTED],
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "<image>What is it?"}],
        "chosen": {"from": "gpt", "value": "Paris"},
        "rejected": {"from": "gpt", "value": "The river"},
        "images": ["images/a.png"],
    },
    "ms-swift": {
        "messages": [{"role": "user", "content": "<image>What is it?"}, *CHOSEN],
        "rejected_response": "The river",
        "images": ["images/a.png"],
    },
    "ms-swift, rejected_messages": {
        "messages": [{"role": "user", "content": "<image>What is it?"}, *CHOSEN],
        "rejected_messages": [{"role": "user", "content": "<image>What is it?"}, *REJECTED],
        "images": ["images/a.png"],
    },
    "OpenAI": openai({"type": "image_url", "image_url": {"url": DATA_URL, "detail": "high"}}),
    "OpenAI, responses": openai({"type": "input_image", "image_url": DATA_URL}),
    "image in the part": openai({"type": "image", "image": "images/a.png"}),
    "path in the part": openai({"type": "image", "path": "images/a.png"}),
    "base64 in the part": openai({"type": "image", "base64": base64.b64encode(png()).decode()}),
}


def pixels(stored: dict) -> np.ndarray:
    return np.array(open_image(stored))


def check(rows, options: PrepareOptions | None = None) -> Dataset:
    """The rows give one pair: the picture, then the question."""
    prepared = prepare_pairs(rows, qwen_processor(), options or PrepareOptions())
    assert prepared.dropped == []
    assert prepared.dataset.column_names == [*TOKEN_COLUMNS, *CONTEXT_COLUMNS, "row", *IMAGE_COLUMNS]
    for row in prepared.dataset:
        place = "<|vision_start|><|image_pad|><|vision_end|>"
        assert row["prompt_text"] == f"<|im_start|>user\n{place}What is it?<|im_end|>\n<|im_start|>assistant\n"
        assert qwen_processor().tokenizer.decode(row["chosen_ids"]) == "Paris<|im_end|>\n"
        assert qwen_processor().tokenizer.decode(row["rejected_ids"]) == "The river<|im_end|>\n"
        assert row["prompt_ids"].count(qwen_processor().image_token_id) == 6
        assert [list(pixels(image).shape) for image in row["images"]] == [[96, 64, 3]]
        assert np.array_equal(pixels(row["images"][0]), np.array(PICTURE))
        assert row["image_sizes"] == [[64, 96]]
    return prepared.dataset


@pytest.mark.parametrize("what", SPELLINGS)
def test_a_file_of_each_spelling(what, folder):
    row = {key: value for key, value in SPELLINGS[what].items() if value is not None}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    check(load_rows(str(folder / "pairs.jsonl")))


def in_memory(kind: str, folder: Path):
    image = {
        "PIL": PICTURE,
        "pixels": np.array(PICTURE),
        "bytes": png(),
        "bytes and path": {"bytes": png(), "path": "a.png"},
        "path": "images/a.png",
        "pathlib": Path("images/a.png"),
        "data URL": DATA_URL,
    }[kind]
    return image


@pytest.mark.parametrize("kind", ["PIL", "pixels", "bytes", "bytes and path", "path", "pathlib", "data URL"])
def test_rows_in_memory(kind, folder, monkeypatch):
    monkeypatch.chdir(folder)
    image = in_memory(kind, folder)
    check([{**TRL, "images": [image]}, {**TRL, "images": image}])
    check([{**openai({"type": "image", "image": image})}])


def test_a_list_and_a_single_image_in_one_column(folder, monkeypatch):
    monkeypatch.chdir(folder)
    dataset = check([{**TRL, "images": [PICTURE]}, {**TRL, "images": "images/a.png"}])
    assert [image["path"] is None for row in dataset for image in row["images"]] == [True, False]


@pytest.mark.parametrize("many", [True, False])
def test_image_features_are_not_decoded_and_not_written_again(many, monkeypatch):
    values = [[PICTURE], [PICTURE]] if many else [PICTURE, PICTURE]
    name, feature = ("images", List(Image())) if many else ("image", Image())
    columns = {"prompt": [[USER]] * 2, "chosen": [CHOSEN] * 2, "rejected": [REJECTED] * 2, name: values}
    dataset = Dataset.from_dict(columns).cast_column(name, feature)
    monkeypatch.setattr(Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    inner = dataset.data.column(name)[0].as_py()
    kept = check(dataset)[0]["images"][0]["bytes"]
    assert kept == (inner[0] if many else inner)["bytes"]


def test_a_stream_of_images():
    def rows():
        for _ in range(2):
            yield {**TRL, "images": [PICTURE]}

    check(IterableDataset.from_generator(rows))


def test_parquet_with_embedded_images_and_a_saved_data_set(folder):
    rows = {"prompt": [[USER]], "chosen": [CHOSEN], "rejected": [REJECTED], "images": [[PICTURE]]}
    dataset = Dataset.from_dict(rows).cast_column("images", List(Image()))
    dataset.to_parquet(folder / "pairs.parquet")
    dataset.save_to_disk(folder / "saved")
    check(load_rows(str(folder / "pairs.parquet")))
    check(load_rows(str(folder / "saved")))


def test_csv(folder):
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected", "image"])
        writer.writerow(["What is it?", "Paris", "The river", "images/a.png"])
        writer.writerow(["<image>What is it?", "Paris", "The river", '["images/a.png"]'])
    check(load_rows(str(folder / "pairs.csv")), PrepareOptions(apply_chat_template=True))


def test_rlaif_v(folder):
    """Its columns, with others beside them. https://huggingface.co/datasets/openbmb/RLAIF-V-Dataset"""
    row = {"ds_name": "RLAIF-V", "image": {"bytes": png(), "path": "a.jpg"}, "question": "What is it?", "idx": 7}
    rows = [{**row, "chosen": "Paris", "rejected": "The river", "origin_dataset": "VQAv2", "image_path": "a.jpg"}]
    with pytest.raises(UserError, match="set prompt_column=question"):
        prepare_pairs(rows, qwen_processor(), PrepareOptions())
    check(rows, PrepareOptions(prompt_column="question", apply_chat_template=True))


def test_rows_with_and_without_images_and_several_turns():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "A fox."},
        {"role": "user", "content": "And <image>?"},
    ]
    rows = [
        {**TRL, "images": [PICTURE, drawing(32, 64, 2)], "prompt": turns},
        {**TRL, "images": [], "prompt": [{"role": "user", "content": "Hi"}]},
        {**TRL, "images": None, "prompt": [{"role": "user", "content": "Hi"}]},
    ]
    dataset = prepare_pairs(rows, qwen_processor(), PrepareOptions()).dataset
    assert [len(images) for images in dataset["images"]] == [2, 0, 0]
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    text = dataset[0]["prompt_text"]
    assert f"user\n{place}What?<|im_end|>" in text and f"user\nAnd {place}?<|im_end|>" in text
    assert dataset[0]["image_sizes"] == [[64, 96], [32, 64]]
    assert dataset[1]["prompt_ids"] == dataset[2]["prompt_ids"]


def test_processes(folder):
    rows = [{**TRL, "images": [drawing(32 + i, 64, i)]} for i in range(6)]
    one = prepare_pairs(rows, qwen_processor(), PrepareOptions()).dataset
    two = prepare_pairs(rows, qwen_processor(), PrepareOptions(dataset_num_proc=2, truncation_side="right")).dataset
    assert one[:] == two[:]


# -- places --


def read(row: dict, **options) -> Pair:
    return detect_format(list(row), [row], PrepareOptions(**options)).pair(row)


def test_text_marks_are_words_where_parts_say_where_images_are():
    content = [IMAGE, {"type": "text", "text": "What does <image> mean in HTML?"}]
    pair = read({**TRL, "images": [png()], "prompt": [{"role": "user", "content": content}]})
    assert pair.prompt == [{"role": "user", "content": content}] and len(pair.images) == 1


def test_text_marks_are_words_where_there_is_no_image_column():
    assert read({"prompt": "An <image> tag", "chosen": "a", "rejected": "b"}).prompt == "An <image> tag"


def test_images_go_in_front_of_the_first_question():
    prompt = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "A?"}]
    prompt += [{"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"}]
    pair = read({**TRL, "images": [png(), png()], "prompt": prompt})
    assert pair.prompt[1]["content"] == [IMAGE, IMAGE, {"type": "text", "text": "A?"}]
    assert [message["content"] for message in pair.prompt[2:]] == ["B.", "C?"]


def test_a_message_that_carries_its_image_takes_none_of_the_column():
    content = [{"type": "image", "image": DATA_URL}, IMAGE, QUESTION]
    pair = read({**TRL, "images": [b"of the column"], "prompt": [{"role": "user", "content": content}]})
    assert [image["bytes"] for image in pair.images] == [png(), b"of the column"]


def test_frames_that_are_not_used_are_said(folder):
    other = drawing(64, 96, 2)
    PICTURE.save(folder / "images" / "a.gif", save_all=True, append_images=[other])
    row = {**TRL, "images": ["images/a.gif"]}
    prepared = prepare_pairs([TRL, row], qwen_processor(), PrepareOptions(image_folder=str(folder)), name="train")
    (note,) = prepared.notes
    assert (note.rows, note.row, "several frames" in note.kind) == (1, 1, True)


def test_images_are_ignored_when_asked():
    for row in (TRL, openai({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})):
        pair = read(row, image_column="")
        assert pair.images == [] and pair.prompt == [{"role": "user", "content": "What is it?"}]


def test_an_image_column_of_another_name():
    pair = read({**TRL, "images": "not this", "photo": png()}, image_column="photo")
    assert len(pair.images) == 1


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"images": [b"1", b"2"]}, "image count"),
        ({"images": []}, "image count"),
        ({"prompt": [{"role": "user", "content": "<image> or <image>"}]}, "image count"),
        ({"chosen": [{"role": "assistant", "content": [IMAGE, QUESTION]}]}, "image in a completion"),
    ],
)
def test_bad_places(change, kind):
    with pytest.raises(BadRow) as caught:
        read({**TRL, "images": [png()], **change})
    assert caught.value.kind == kind


# -- the cache --


@pytest.fixture
def built(monkeypatch) -> list[str]:
    folders = []
    real = prepare._build

    def build(folder, *arguments):
        folders.append(folder.name)
        real(folder, *arguments)

    monkeypatch.setattr(prepare, "_build", build)
    return folders


def test_a_changed_image_file_is_another_content(folder, built):
    (folder / "pairs.jsonl").write_text(json.dumps(TRL) + "\n")

    def prepared() -> Dataset:
        return prepare_pairs(load_rows(str(folder / "pairs.jsonl")), qwen_processor(), PrepareOptions()).dataset

    first = prepared()
    assert prepared()[:] == first[:] and len(built) == 1
    assert first[0]["images"] == [{"bytes": None, "path": str(folder / "images" / "a.png")}]
    drawing(128, 96, 1).save(folder / "images" / "a.png")
    assert prepared()[0]["image_sizes"] == [[128, 96]] and len(built) == 2
    status = os.stat(folder / "images" / "a.png")
    os.utime(folder / "images" / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    prepared()
    assert len(built) == 3


def test_a_missing_image_that_appears_later_is_read(folder, built):
    (folder / "pairs.jsonl").write_text(json.dumps(TRL) + "\n" + json.dumps({**TRL, "images": ["b.png"]}) + "\n")
    for count in (1, 2):
        rows = load_rows(str(folder / "pairs.jsonl"))
        prepared = prepare_pairs(rows, qwen_processor(), PrepareOptions(max_bad_rows=1))
        assert len(prepared.dataset) == count
        PICTURE.save(folder / "b.png")


def test_images_in_memory_are_keyed_by_their_bytes(built):
    for colour in ("red", "red", "blue"):
        rows = [{**TRL, "images": [pillow.new("RGB", (64, 64), colour)]}]
        prepare_pairs(rows, qwen_processor(), PrepareOptions())
    assert len(built) == 2


def test_addresses_are_fetched_once_into_the_prepared_data(monkeypatch):
    asked = []

    def fetch(address, column):
        asked.append(address)
        if "gone" in address:
            raise BadRow("missing image", column, f"{address} cannot be fetched: 404")
        return png()

    monkeypatch.setattr("orpo_dist.images.source.fetch", fetch)
    rows = [{**TRL, "images": ["https://example.org/a.png"]}] * 3 + [{**TRL, "images": ["https://example.org/gone"]}]
    options = PrepareOptions(allow_image_urls=True, max_bad_rows=1)
    for _ in range(2):
        prepared = prepare_pairs(rows, qwen_processor(), options)
        assert [image["bytes"] for row in prepared.dataset for image in row["images"]] == [png()] * 3
        assert [(row.kind, row.row) for row in prepared.dropped] == [("missing image", 3)]
    assert sorted(asked) == ["https://example.org/a.png", "https://example.org/gone"]


def test_a_default_run_drops_no_image_for_its_length(folder):
    """max_length is 1024 for text; here an image of 1,280 tokens, as Qwen2-VL's."""
    from transformers import Qwen2VLImageProcessorPil

    processor = type(qwen_processor())(
        Qwen2VLImageProcessorPil(), qwen_processor().tokenizer, qwen_processor().video_processor,
        chat_template=qwen_processor().chat_template,
    )  # fmt: skip
    rows = [{**TRL, "images": [pillow.new("RGB", (1120, 896))]}]
    assert prepare_pairs(rows, processor, PrepareOptions()).dataset[0]["image_tokens"] == 1280 + 2
    with pytest.raises(UserError, match="images too long"):
        prepare_pairs(rows, processor, PrepareOptions(max_length=1024))
