"""Which image stands where in a prompt: parts of messages, `<image>` in text, or in front of the text."""

from dataclasses import dataclass
from typing import Any

from orpo_dist.data.messages import Message
from orpo_dist.errors import BadRow
from orpo_dist.images.decode import StoredImage
from orpo_dist.images.source import ImageSource

PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class PlacedImages:
    """A prompt and its images in the order in which they stand in it.

    As messages, every image is a part {"type": "image"}. As text, there are as many `<image>` as images, or none: then
    all images stand before the text.
    """

    prompt: str | list[Message]
    images: list[StoredImage]


def place_images(
    prompt: str | list[Message], given: list[StoredImage], source: ImageSource, file: str | None, columns: "Columns"
) -> PlacedImages:
    """Puts the images `given` by the image column in their places. An image that a message carries itself takes none
    of them, as in TRL's prepare_multimodal_messages.

    Raises:
        BadRow: the number of places differs from the number of images, or an image that a message carries is none.
    """
    if isinstance(prompt, str):
        places = prompt.count(PLACEHOLDER) if columns.image else 0
        if places not in (0, len(given)):
            raise _count(columns, len(given), places)
        return PlacedImages(prompt, given)
    if (indices := _indices(prompt, columns)) is not None:
        given = _by_index(given, indices, columns)
    parts = sum(part["type"] == "image" and "image" not in part for message in prompt for part in _parts(message))
    marks = sum(part.get("text", "").count(PLACEHOLDER) for message in prompt for part in _parts(message))
    if parts == len(given) and (parts or not columns.image):
        marks = 0  # `<image>` is a word of the text
    if given and parts + marks == 0:
        prompt, parts = _in_front(prompt, len(given)), len(given)
    if parts + marks != len(given):
        raise _count(columns, len(given), parts + marks)
    rest, images, messages = iter(given), [], []
    for message in prompt:
        content: list[dict[str, Any]] = []
        for part in _parts(message):
            for piece in _split(part["text"]) if marks and part["type"] == "text" else [part]:
                if piece["type"] == "image" and "image" in piece:
                    carried = source.stored(piece["image"], columns.prompt, file)
                    if len(carried) != 1:
                        raise _count(columns, len(carried), 1)
                    images += carried
                elif piece["type"] == "image":
                    images.append(next(rest))
                content.append({"type": "image"} if piece["type"] == "image" else piece)
        has_image = any(part["type"] == "image" for part in content)
        messages.append({**message, "content": content} if has_image else message)
    return PlacedImages(messages, images)


@dataclass(frozen=True)
class Columns:
    """Names for the messages of bad rows; `image` is None where the data set has no such column."""

    image: str | None
    prompt: str


def without_images(messages: str | list[Message]) -> str | list[Message]:
    """The messages without their image parts."""
    if isinstance(messages, str):
        return messages
    return [{**m, "content": "".join(part.get("text", "") for part in _parts(m))} for m in messages]


def has_images(messages: str | list[Message]) -> bool:
    """Whether a message has an image part."""
    return not isinstance(messages, str) and any(p["type"] == "image" for m in messages for p in _parts(m))


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _indices(prompt: list[Message], columns: Columns) -> list[Any] | None:
    """The numbers that the parts give of their images; None where they give none."""
    places = [part for message in prompt for part in _parts(message) if part["type"] == "image" and "image" not in part]
    found = [part["index"] for part in places if "index" in part]
    if found and len(found) < len(places):
        raise BadRow("image count", columns.prompt, "some images have an `index`, and some have none")
    return found or None


def _by_index(given: list[StoredImage], indices: list[Any], columns: Columns) -> list[StoredImage]:
    """The images in the order of their numbers, counted from 0; every image must have a place."""
    for index in indices:
        if type(index) is not int or not 0 <= index < len(given):
            known = f"0 to {len(given) - 1}" if given else "no image at all"
            raise BadRow("image count", columns.prompt, f"an image has `index` {index!r}, and the row has {known}")
    if set(indices) != set(range(len(given))):
        raise _count(columns, len(given), len(set(indices)))
    return [given[index] for index in indices]


def _in_front(prompt: list[Message], count: int) -> list[Message]:
    first = next((i for i, message in enumerate(prompt) if message["role"] == "user"), len(prompt) - 1)
    content = [{"type": "image"}] * count + _parts(prompt[first])
    return [*prompt[:first], {**prompt[first], "content": content}, *prompt[first + 1 :]]


def _split(text: str) -> list[dict[str, Any]]:
    """`a<image>b` as three parts, without empty texts."""
    pieces: list[dict[str, Any]] = []
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        pieces += [{"type": "image"}] if index else []
        pieces += [{"type": "text", "text": piece}] if piece else []
    return pieces


def _count(columns: Columns, images: int, places: int) -> BadRow:
    column = columns.image or columns.prompt
    return BadRow("image count", column, f"the row has {images} images, and its prompt has places for {places}")
