"""Media that is not read never leaves a text run behind: it makes bad rows, or stops the run."""

import numpy as np
import pytest

from orpo_dist.data.prepare import prepare_pairs
from orpo_dist.errors import UserError
from orpo_dist.options.data import PrepareOptions
from tests.data.processors import qwen_processor
from tests.images.pictures import encoded, gradient

PICTURE = {"bytes": encoded(gradient(32, 32)), "path": None}
ANSWERS = {
    "chosen": [{"role": "assistant", "content": "Paris"}],
    "rejected": [{"role": "assistant", "content": "Rome"}],
}
TEXT = {"prompt": [{"role": "user", "content": "What is it?"}], **ANSWERS}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def prepared(rows, processing_class=None, **options):
    return prepare_pairs(rows, processing_class or qwen_processor(), PrepareOptions(max_bad_rows=0.9, **options))


UNREAD = [
    {"videos": ["a.mp4"]},
    {"video": "a.mp4"},
    {"audios": ["a.wav"]},
    {"audio": {"bytes": b"RIFF", "path": None}},
    {"Video_Path": "a.mp4"},
    {"audio_urls": '["https://example.org/a.wav"]'},
    {"objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}},
    {"objects": [{"bbox_2d": [1, 2, 3, 4], "label": "dog"}]},
    {"bbox": [1, 2, 3, 4]},
    {"sound": {"array": [0.1, 0.2], "sampling_rate": 16000}},
    {"spoken": {"bytes": b"RIFF", "path": "a.wav"}},
    {"clip": "a.mp4"},
    {"recordings": ["a.mp3", "b.mp3"]},
]


@pytest.mark.parametrize("media", UNREAD, ids=lambda media: next(iter(media)))
@pytest.mark.parametrize("model", ["vlm", "text"])
def test_other_media_make_bad_rows(media, model, chat_tokenizer):
    tokenizer = qwen_processor() if model == "vlm" else chat_tokenizer
    result = prepared([TEXT, {**TEXT, **media}], tokenizer)
    assert [(row.row, row.column, row.kind) for row in result.dropped] == [(1, next(iter(media)), "media not read")]
    assert len(prepared([TEXT, {**TEXT, **media}], tokenizer, image_column="").dataset) == 2


@pytest.mark.parametrize("empty", [None, "", [], [None], "[]", {"bytes": None, "path": None}, float("nan")])
def test_an_empty_column_of_other_media_is_nothing(empty):
    assert prepared([{**TEXT, "videos": empty}, TEXT]).dropped == []


@pytest.mark.parametrize("column", ["objects", "videos_watched", "audience", "image_id", "rejected_images_score"])
def test_columns_of_similar_names(column, chat_tokenizer):
    assert prepared([{**TEXT, column: ["lamp", "desk"]}], chat_tokenizer).dropped == []


@pytest.mark.parametrize(
    "column",
    ["rejected_image", "rejected_images", "rejectedImages", "images_rejected", "rejected-img", "chosen_images"],
)
def test_images_of_one_answer(column):
    with pytest.raises(UserError, match=f"`{column}`: the images of a pair belong to its prompt"):
        prepared([{**TEXT, "images": [PICTURE], column: [PICTURE]}])
    late = prepared([{**TEXT, "images": [PICTURE]}] * 200 + [{**TEXT, "images": [PICTURE], column: [PICTURE]}])
    assert [(row.row, row.column) for row in late.dropped] == [(200, column)]


LOOKALIKES = [
    PICTURE,
    [PICTURE],
    gradient(32, 32),
    np.zeros((8, 8, 3), np.uint8),
    encoded(gradient(), "JPEG"),
    "photos/1.jpg",
    ["photos/1.JPG", "photos/2.png"],
    "https://example.org/a.webp?size=2",
]


@pytest.mark.parametrize("value", LOOKALIKES, ids=lambda value: str(value)[:20])
def test_images_under_another_name(value, chat_tokenizer):
    rows = [{**TEXT, "picture": value}, {**TEXT, "picture": value}]
    with pytest.raises(UserError, match=r"`picture` looks like images, and is not read.*Set image_column=picture"):
        prepared(rows)
    assert "not read: `picture`, which looks like images" in prepared(rows, chat_tokenizer).format
    assert prepared(rows, image_column="").dropped == []


def test_what_stands_beside_the_image_column():
    rows = [{**TEXT, "image": PICTURE, "image_path": "a/b.jpg"}] * 2
    assert prepared(rows).dataset[0]["image_tokens"]  # the same image's name, as in rlaif-v_formatted
    rows = [{**TEXT, "image": PICTURE, "image_2": PICTURE}] * 2
    with pytest.raises(
        UserError, match=r"`image_2` looks like images, and is not read\. The images are read from `image`"
    ):
        prepared(rows)
    assert len(prepared(rows, image_column="image").dataset) == 2


def test_image_beside_an_empty_images():
    rows = [{**TEXT, "images": [], "image": PICTURE}] * 2
    assert [len(row["images"]) for row in prepared(rows).dataset] == [1, 1]


def test_both_image_columns():
    rows = [{**TEXT, "images": [PICTURE]}] * 3 + [{**TEXT, "image": PICTURE}]
    assert [(row.row, row.column, row.kind) for row in prepared(rows).dropped] == [(3, "image", "media not read")]


@pytest.mark.parametrize("place", ["<video>", "<audio>", "<bbox>", "<ref-object>"])
def test_places_of_other_media(place, chat_tokenizer):
    row = {**TEXT, "images": [PICTURE]}
    asking = {**row, "prompt": [{"role": "user", "content": f"<image>What is in {place}?"}]}
    (dropped,) = prepared([row, asking]).dropped
    assert dropped.kind == "media not read" and place in dropped.reason
    html = {**TEXT, "prompt": [{"role": "user", "content": f"How do I use {place} in HTML?"}]}
    assert prepared([html], chat_tokenizer).dropped == []


@pytest.mark.parametrize(
    "place",
    ["<image 1>", "<image_1>", "<image-2>", "<|image_1|>", "<img>photo.jpg</img>", "<Image>", "<ImageHere>"],
)
def test_places_of_images_in_another_spelling(place):
    row = {**TEXT, "images": [PICTURE]}
    asking = {**row, "prompt": [{"role": "user", "content": f"What is in {place}?"}]}
    (dropped,) = prepared([row, asking]).dropped
    assert dropped.kind == "media not read" and f"`{place}` for an image" in dropped.reason
    html = {**row, "prompt": [{"role": "user", "content": "How do I write <img src='photo.jpg'>?"}]}
    assert prepared([row, html]).dropped == prepared([{**TEXT, "prompt": asking["prompt"]}]).dropped == []


def test_columns_of_numbers_and_addresses_are_no_recordings(chat_tokenizer):
    row = {**TEXT, "clip": 0.31, "media": "news", "source": "https://example.org/a.mp4"}
    assert prepared([row], chat_tokenizer).dropped == []


@pytest.mark.parametrize("key", ["images", "image", "videos", "audio"])
def test_media_beside_the_content_of_a_message(key):
    asking = {**TEXT, "prompt": [{"role": "user", "content": "What is it?", key: ["iVBORw0KGgo"]}]}
    (dropped,) = prepared([TEXT, asking]).dropped
    assert (dropped.kind, dropped.column) == ("media not read", "prompt") and f"`{key}`" in dropped.reason


def test_an_image_in_a_part_of_text():
    part = {"type": "text", "text": "What is it?", "image": "a.png"}
    (dropped,) = prepared([TEXT, {**TEXT, "prompt": [{"role": "user", "content": [part]}]}]).dropped
    assert dropped.kind == "wrong type" and "an image in a part of type text" in dropped.reason
