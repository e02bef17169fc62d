"""Which image stands where in a prompt, by hand."""

import pytest

from orpo_dist.data.place_images import Columns, has_images, place_images, without_images
from orpo_dist.errors import BadRow
from orpo_dist.images.source import ImageSource

COLUMNS = Columns(image="images", prompt="prompt")
A, B = {"bytes": b"a", "path": None}, {"bytes": b"b", "path": None}
IMAGE = {"type": "image"}


def placed(prompt, *images):
    return place_images(prompt, list(images), ImageSource(), None, COLUMNS)


def user(content):
    return {"role": "user", "content": content}


def words(text):
    return {"type": "text", "text": text}


def test_text_keeps_its_places_or_has_none():
    assert placed("<image> and <image>?", A, B).images == [A, B]
    assert placed("What is this?", A).prompt == "What is this?"


def test_placeholders_in_messages_become_parts():
    assert placed([user("This <image> or <image>?")], A, B).prompt == [
        user([words("This "), IMAGE, words(" or "), IMAGE, words("?")])
    ]


def test_images_without_a_place_stand_before_the_first_question():
    system = {"role": "system", "content": "Be kind."}
    assert placed([system, user("What is this?")], A).prompt == [system, user([IMAGE, words("What is this?")])]


def test_a_placeholder_beside_parts_is_a_word():
    prompt = [user([IMAGE, words("Say <image>.")])]
    assert placed(prompt, A).prompt == prompt


@pytest.mark.parametrize("prompt", ["<image> <image>", [user("<image> <image>")], [user([IMAGE, IMAGE])]])
def test_as_many_places_as_images(prompt):
    with pytest.raises(BadRow) as bad:
        placed(prompt, A)
    assert bad.value.kind == "image count" and "has 1 images, and its prompt has places for 2" in bad.value.reason


def test_messages_without_their_images():
    messages = [user([IMAGE, words("a"), words("b")])]
    assert has_images(messages) and not has_images("text") and not has_images([user("a")])
    assert without_images(messages) == [user("ab")]
    assert without_images("text") == "text"


def numbered(index):
    return {"type": "image", "index": index}


def test_the_index_of_a_part_says_which_image():
    assert placed([user([numbered(1), words("or"), numbered(0)])], A, B).images == [B, A]
    assert placed([user([numbered(0), numbered(1), words("or"), numbered(0)])], A, B).images == [A, B, A]
    assert placed([user([numbered(0)])], A).prompt == [user([IMAGE])]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([numbered(1)], "has `index` 1, and the row has 0 to 0"),
        ([numbered(-1)], "has `index` -1"),
        ([numbered("0")], "has `index` '0'"),
        ([numbered(0), IMAGE], "some have none"),
    ],
)
def test_an_index_without_its_image(parts, reason):
    with pytest.raises(BadRow, match=reason) as bad:
        placed([user(parts)], A)
    assert bad.value.kind == "image count"


def test_every_image_needs_an_index():
    with pytest.raises(BadRow, match="has 2 images, and its prompt has places for 1"):
        placed([user([numbered(1)])], A, B)
