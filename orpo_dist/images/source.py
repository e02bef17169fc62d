"""Values of a row -> stored images: paths, bytes, data URLs, `datasets` images; web addresses only where allowed.

A data set is somebody else's text. A path in it must not reach files outside the image folder, whatever it is made of
(absolute, `..`, a symbolic link), and an address in it is only fetched when the user has said so.
"""

import ast
import base64
import binascii
import http.client
import json
import os
import re
import time
import urllib.error
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from orpo_dist.errors import BadRow
from orpo_dist.images import web
from orpo_dist.images.decode import MAX_BYTES, StoredImage, short
from orpo_dist.images.pixels import UNREADABLE, pixels_in_lists, stored_pixels

# Keys under which public data sets and APIs keep the image in a mapping; `image_url` may hold a mapping again.
REFERENCE_KEYS = ("bytes", "path", "image", "url", "image_url", "base64", "data")
WEB = web.SCHEMES
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
MAX_NAME = 255  # characters of a file's name, on every common file system
# First bytes of the formats in decode.FORMATS; PPM's two letters would be found in any text.
_MAGIC = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|RIFF....WEBP|GIF8[79]a|BM....\0\0\0\0|II\*\0|MM\0\*"
    rb"|....ftypavi|\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    re.DOTALL,
)
URL_TIMEOUT = 20.0  # seconds of one attempt, from resolving the host to the last byte
URL_ATTEMPTS = 3
URL_THREADS = 8


@dataclass(frozen=True)
class ImageSource:
    """Where the images of a data set may come from.

    folder: option image_folder; None: the folder of the row's file, or the current one for rows that are from none.
    """

    folder: str | None = None
    allow_urls: bool = False
    allow_outside: bool = False

    def stored(self, value: Any, column: str, file: str | None) -> list[StoredImage]:
        """The images of a cell, one or a list of them; none for None, an empty text and an empty list. A web address
        stays one, as the path: `fetch_all` fetches it.

        Raises:
            BadRow: not an image, a path outside the folder, an address that is not allowed.
        """
        if isinstance(value, str):
            value = _list_in_text(value)
        if pixels := pixels_in_lists(value):
            return [self._one(stored_pixels(array), column, file) for array in pixels]
        if value is None or value == "" or value == []:
            return []
        values = value if isinstance(value, list | tuple) else [value]
        return [self._one(item, column, file) for item in values]

    def _one(self, value: Any, column: str, file: str | None) -> StoredImage:
        if isinstance(value, dict):
            if value.get(UNREADABLE):
                raise BadRow("unreadable image", column, value[UNREADABLE])
            value = embedded_image(value)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, bytes | bytearray):
            return {"bytes": bytes(value), "path": None}
        if value is None or value == "":
            raise BadRow("missing image", column, "an image without content and without path")
        if not isinstance(value, str):
            raise BadRow("wrong type", column, f"{short(value)} is not an image")
        if value[:5].lower() == "data:":
            return {"bytes": _data_url(value, column), "path": None}
        if (content := _in_base64(value)) is not None:
            return {"bytes": content, "path": None}
        # A drive letter is one character, and a file name may hold a colon.
        scheme = value.split("://", 1)[0].lower() if "://" in value else ""
        if scheme in WEB:
            if not self.allow_urls:
                raise BadRow("image URL", column, f"{short(value)} is a web address, and allow_image_urls is off")
            return {"bytes": None, "path": value}
        if scheme == "file":
            value = url2pathname(urlsplit(value).path)
        elif scheme:
            raise BadRow("wrong type", column, f"{short(value)} is neither a path nor an address that is known here")
        return {"bytes": None, "path": self._path(value, column, file)}

    def _path(self, value: str, column: str, file: str | None) -> str:
        if max(map(len, value.split("/"))) > MAX_NAME:  # a file cannot have that name: it is some other text
            raise BadRow("unreadable image", column, f"{short(value)} is neither a path nor an encoded image")
        folder = Path(self.folder).expanduser() if self.folder else Path(file).parent if file else Path.cwd()
        try:
            root, path = folder.resolve(), (folder / value).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte
            raise BadRow("unreadable image", column, f"{short(value)}: {error}") from None
        roots = [root] if self.folder or file else [root, *_library_caches()]
        if not (self.allow_outside or any(path.is_relative_to(allowed) for allowed in roots)):
            raise BadRow("image outside", column, f"{short(value)} lies outside of {folder}")
        return str(path)


def embedded_image(value: dict[str, Any]) -> Any:
    """What a mapping says of its image: `{"bytes", "path"}`, `{"url"}`, `{"image_url": {"url"}}`, `{"base64"}`; None if
    nothing."""
    for key in REFERENCE_KEYS:
        found = value.get(key)
        if found is None or found == "":
            continue
        if isinstance(found, dict):
            return embedded_image(found)
        if key in ("bytes", "base64") and isinstance(found, str) and found[:5].lower() != "data:":
            return f"data:;base64,{found}"
        if key in ("bytes", "data") and isinstance(found, list) and all(_is_byte(item) for item in found):
            return bytes(found)  # as JSON.stringify writes a buffer
        return found
    return None


def looks_like_picture(value: Any) -> bool:
    """Whether a value, or each of a list, holds the content of an image."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(looks_like_picture, value))
    if isinstance(value, dict):
        return looks_like_picture(embedded_image(value))
    if isinstance(value, bytes | bytearray):
        return _MAGIC.match(value) is not None
    return isinstance(value, str) and (value[:11].lower() == "data:image/" or _in_base64(value) is not None)


def looks_like_image(value: Any) -> bool:
    """As `looks_like_picture`, and the path or address of a file that is named like an image."""
    if isinstance(value, str):
        value = _list_in_text(value)
    if isinstance(value, list | tuple):
        return bool(value) and all(map(looks_like_image, value))
    if isinstance(value, dict):
        return looks_like_image(embedded_image(value))
    if isinstance(value, str) and "\n" not in value and value.split("?")[0].lower().endswith(_EXTENSIONS):
        return True
    return looks_like_picture(value)


def is_url(stored: StoredImage) -> bool:
    """Whether the image is still to be fetched."""
    return stored["bytes"] is None and str(stored["path"]).split("://", 1)[0].lower() in WEB


def fetch_all(images: Sequence[StoredImage], column: str) -> dict[str, StoredImage | BadRow]:
    """The images at web addresses among `images`, by address, several at a time; a failure is its BadRow."""
    addresses = list(dict.fromkeys(str(image["path"]) for image in images if is_url(image)))
    if not addresses:
        return {}

    def one(address: str) -> StoredImage | BadRow:
        try:
            return {"bytes": fetch(address, column), "path": None}
        except BadRow as bad:
            return bad

    with ThreadPoolExecutor(URL_THREADS) as pool:
        return dict(zip(addresses, pool.map(one, addresses), strict=True))


def fetch(address: str, column: str) -> bytes:
    """What lies at a web address.

    Raises:
        BadRow: "missing image" when it cannot be had in time or is not in the public internet, "image too large".
    """
    last = time.monotonic() + URL_ATTEMPTS * URL_TIMEOUT
    for attempt in range(URL_ATTEMPTS):
        try:
            return web.get(address, min(last, time.monotonic() + URL_TIMEOUT), MAX_BYTES)
        except web.TooLarge as error:
            raise BadRow("image too large", column, f"{short(address)} has {error}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and HTTPError are OSErrors
            client_error = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code != 429
            pause = 2**attempt / 2
            late = attempt + 1 == URL_ATTEMPTS or time.monotonic() + pause >= last
            if client_error or isinstance(error, ValueError) or late:
                raise BadRow("missing image", column, f"{short(address)} cannot be fetched: {error}") from None
            time.sleep(pause)
    raise AssertionError("unreachable")


def _data_url(url: str, column: str) -> bytes:
    header, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        content = unquote_to_bytes(body)
        return base64.b64decode(content, validate=False) if header.lower().endswith(";base64") else content
    except (ValueError, binascii.Error) as error:
        raise BadRow("unreadable image", column, f"{short(url)} is not a data URL: {error}") from None


def _in_base64(text: str) -> bytes | None:
    """The image that the text is in base64; None for a path, whose letters are those of base64 too."""
    if len(text) < 60 or _MAGIC.match(_from_base64(text[:32])) is None:
        return None
    return _from_base64(text)


def _from_base64(text: str) -> bytes:
    plain = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4))
    except (ValueError, binascii.Error):
        return b""


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value < 256


def _list_in_text(text: str) -> Any:
    """The list of paths, or the mapping, that a CSV cell spells out in JSON or Python, or the text itself."""
    stripped = text.strip()
    if (stripped[:1], stripped[-1:]) not in (("[", "]"), ("{", "}")):
        return stripped
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, list | dict) else stripped
    return stripped


def _library_caches() -> list[Path]:
    """Where `datasets` keeps the files of a hub data set, whose rows name them by absolute path."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(folder).resolve() for folder in (config.HF_DATASETS_CACHE, HF_HUB_CACHE)]
