"""Media that is not read: videos, sounds, boxes, images of one answer, and images in columns with other names.

Nothing of them reaches the model, and the text around them asks about them. So a row that has such media is a bad row;
columns that hold images under another name stop the run of a vision-language model that has found no image column.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orpo_dist.data.messages import Message, decode
from orpo_dist.errors import BadRow, UserError
from orpo_dist.images.decode import short
from orpo_dist.images.source import looks_like_image, looks_like_picture

IMAGE_COLUMNS = ("images", "image")
# Names of columns and of keys of a message, in lower case and without separators.
_VIDEO_OR_SOUND = re.compile(r"(videos?|audios?)(paths?|urls?|files?|bytes)?\d*")
_MEDIUM = re.compile(r"(images?|imgs?|pictures?|photos?|videos?|audios?)(paths?|urls?|files?|bytes)?\d*")
_IN_MESSAGES = ("image", "images", "video", "videos", "audio", "audios")  # Ollama's messages have `images`
# ms-swift's places for videos, sounds and boxes (its column `objects` has `ref` and `bbox`).
# https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html
_PLACES = re.compile(r"<(video|audio|bbox|ref-object)>")
# Places for images in other spellings than `<image>`: MMMU's `<image 1>`, Phi-3-vision's `<|image_1|>`, Qwen-VL's
# `<img>photo.jpg</img>`, InternLM-XComposer's `<ImageHere>`. None is the placeholder of a processor of transformers.
_OTHER_IMAGES = re.compile(r"<\|?image[ _-]?\d+\|?>|<img>[^<>\n]+</img>|<ImageHere>|<Image>|<IMAGE>")
# Columns of these names have videos or sounds where the values are files of such; a `clip` may be a number.
_PERHAPS = re.compile(r"(sounds?|speech|voices?|waveforms?|wavs?|recordings?|clips?|movies?|films?|media)")
_FILES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac")
BOXES = {"ref", "bbox", "bbox_2d", "boxes"}


@dataclass(frozen=True)
class MediaColumns:
    """image: the column of the images, None where there is none, "" where images are ignored. unread: columns in which
    a value makes a bad row. lookalikes: columns whose values in the first rows look like images, and are not read."""

    image: str | None
    unread: tuple[str, ...] = ()
    lookalikes: tuple[str, ...] = ()


def find_media(
    columns: Sequence[str], sample: Sequence[dict[str, Any]], given: str | None, read: Sequence[str | None]
) -> MediaColumns:
    """The columns of media from the column names and the first rows.

    given: option image_column; it settles which column has the images, and "" that the text is trained on alone.
    read: the columns of the text.

    Raises:
        UserError: no column `given`, or images of one answer.
    """
    if given == "":
        return MediaColumns("")
    if given and given not in columns:
        names = ", ".join(f"`{name}`" for name in columns if not name.startswith("_")) or "none"
        raise UserError(f"image_column={given}: no such column. The columns are {names}.")
    others = [name for name in columns if name not in read and not name.startswith("_")]
    known = [name for name in IMAGE_COLUMNS if name in others]
    filled = [name for name in known if any(_has_value(row.get(name)) for row in sample)]
    image = given or next(iter([*filled, *known]), None)
    others = [name for name in others if name != image]
    for name in others:
        if _of_an_answer(name) and any(_has_value(row.get(name)) for row in sample):
            raise UserError(
                f"`{name}`: the images of a pair belong to its prompt, and are the same for both answers. Remove the "
                "column, or ignore all images with image_column=''."
            )
    unread = [name for name in others if _is_unread(name, sample) or (not given and name in known)]
    rest = [] if given else [name for name in others if name not in unread]
    looks = looks_like_image if image is None else looks_like_picture  # `image_path` often repeats the column `image`
    lookalikes = [name for name in rest if _all_values(sample, name, looks)]
    return MediaColumns(image, tuple(unread), tuple(lookalikes))


def refuse_lookalikes(media: MediaColumns, where: str) -> None:
    """For a vision-language model: columns that look like images must not be left out unasked.

    Raises:
        UserError: there is one.
    """
    if media.lookalikes:
        name = media.lookalikes[0]
        read = f"The images are read from `{media.image}`" if media.image else "No image column was found"
        raise UserError(
            f"{where}: `{name}` looks like images, and is not read. {read}. Set image_column={media.image or name} to "
            f"read `{media.image or name}` alone, or image_column='' to train on the text alone."
        )


def check_unread(row: dict[str, Any], unread: Sequence[str]) -> None:
    """Raises BadRow "media not read" where one of those columns has a value."""
    for name in unread:
        if _has_value(row.get(name)):
            raise BadRow("media not read", name, "the row has media in this column, which is not read")


def check_messages(messages: str | list[Message], column: str, has_images: bool) -> None:
    """Places of media that is not read. Without images in the data set, `<video>` is a word of the text (HTML).

    Raises:
        BadRow: "media not read".
    """
    if isinstance(messages, str):
        found = _place(messages) if has_images else None
    else:
        found = next((f"a message has `{key}` beside its content" for message in messages for key in _IN_MESSAGES
                      if _has_value(message.get(key))), None)  # fmt: skip
        if found is None and has_images:
            found = next(filter(None, (_place(text) for message in messages for text in _texts(message))), None)
    if found is not None:
        raise BadRow("media not read", column, f"{found}, which is not read")


def _place(text: str) -> str | None:
    if found := _OTHER_IMAGES.search(text):
        return f"the text has a place `{short(found[0])}` for an image, spelled otherwise than `<image>`"
    found = _PLACES.search(text)
    return f"the text has a place `{found[0]}`" if found and f"</{found[1]}>" not in text else None


def _texts(message: Message) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]


def _of_an_answer(name: str) -> bool:
    rest = re.sub("rejected|chosen", "", plain := _plain(name))
    return rest != plain and _MEDIUM.fullmatch(rest) is not None


def _is_unread(name: str, sample: Sequence[dict[str, Any]]) -> bool:
    plain = _plain(name)
    if _of_an_answer(name) or _VIDEO_OR_SOUND.fullmatch(plain) or plain in ("bbox", "bboxes"):
        return True
    if any(_is_recording(row.get(name), by_name=_PERHAPS.fullmatch(plain) is not None) for row in sample):
        return True
    return plain == "objects" and any(_is_boxes(row.get(name)) for row in sample)


def _is_boxes(value: Any) -> bool:
    value = decode(value)
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, str):
        return any(f'"{word}"' in first for word in BOXES)
    return isinstance(first, dict) and not BOXES.isdisjoint(first)


def _is_recording(value: Any, by_name: bool) -> bool:
    """Whether it is a `datasets.Audio` or `Video`, decoded or not; with `by_name` also the file name of one."""
    value = decode(value)
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        path = first.get("path")
        return first.get("sampling_rate") is not None or (isinstance(path, str) and path.lower().endswith(_FILES))
    return by_name and isinstance(first, str) and first.lower().endswith(_FILES)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _has_value(value: Any) -> bool:
    """Whether there is something: Arrow pads structs with None."""
    value = decode(value)
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null", "None")
    if isinstance(value, dict):
        return any(map(_has_value, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_value, value))
    return value is not None and value is not False and value == value  # NaN is an empty cell


def _all_values(sample: Sequence[dict[str, Any]], name: str, looks: Any) -> bool:
    values = [value for row in sample if _has_value(value := decode(row.get(name)))]
    return bool(values) and all(map(looks, values))
