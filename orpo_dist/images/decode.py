"""Stored image -> PIL image, within limits: what every reader of images goes through.

A stored image is {"bytes": ..., "path": ...}, as `datasets.Image(decode=False)` keeps it: encoded bytes, or the
absolute path of a file. Pillow is imported where it is used: text needs none.
"""

import io
import os
import stat
import sys
import warnings
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy

from orpo_dist.errors import BadRow, UserError
from orpo_dist.images.pixels import UNREADABLE, eight_bits, stored_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

StoredImage = dict[str, Any]

MAX_BYTES = 128 << 20  # of one encoded image
# Of one decoded image: where Pillow begins to warn of a decompression bomb. An RGB image of that size takes 256 MiB.
# https://pillow.readthedocs.io/en/stable/reference/limits.html
MAX_PIXELS = 89_478_485
MAX_NAME = 300  # characters of a path in a message
# Not every format Pillow knows: EPS starts Ghostscript, and others are rare enough to be an attack.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# Of 16 bits per colour Pillow keeps the upper 8, which are nearly black where only the lower 12 are used.
DARKEST = 15
_FRAMES = "orpo_dist_frames"  # key of PIL.Image.Image.info
_TRUNCATED = ("truncated", "unexpected end", "premature end", "not enough", "buffer is not large enough")


def require_pillow(what: str) -> None:
    """Raises UserError where `what` needs Pillow and it is not installed."""
    if find_spec("PIL") is None:
        raise UserError(f"{what} needs Pillow, which is not installed: pip install 'orpo-dist[vlm]'.")


def open_image(stored: StoredImage, column: str | None = None) -> "Image":
    """The decoded image in RGB: upright (EXIF orientation applied), the first frame of several, transparent parts
    white, grey of more than 8 bits scaled to 8 (images/pixels.py).

    Raises:
        BadRow: "missing image", "unreadable image", "truncated image" or "image too large", in `column`.
    """
    from PIL import Image

    content = read_bytes(stored, column)
    where = _name(stored)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about bombs and odd metadata: the limit below is this module's
            Image.init()  # registers the formats, once per process
            known = [name for name in FORMATS if name in Image.OPEN]  # AVIF and JPEG 2000 are optional in Pillow
            image = Image.open(io.BytesIO(content), formats=known)
            if image.width * image.height > MAX_PIXELS:
                raise BadRow("image too large", column, f"{where} has {image.width} x {image.height} pixels")
            sixteen_bits = image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[3]) for tile in image.tile)
            image.load()
            if sixteen_bits and numpy.asarray(image.convert("RGB")).max() <= DARKEST:
                raise ValueError("of its 16 bits per colour only the lower 12 are used; store it with 8")
            upright = _upright_rgb(image)
            # A phone's JPEG (MPO) has a preview or a depth map for a second frame.
            upright.info[_FRAMES] = image.format != "MPO" and getattr(image, "is_animated", False)
            return upright
    except BadRow:
        raise
    except Image.DecompressionBombError as error:
        raise BadRow("image too large", column, f"{where}: {error}") from None
    except Image.UnidentifiedImageError:
        raise BadRow("unreadable image", column, f"{where} is not an image in a known format") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        truncated = isinstance(error, EOFError) or any(word in str(error).lower() for word in _TRUNCATED)
        kind = "truncated image" if truncated else "unreadable image"
        raise BadRow(kind, column, f"{where} cannot be decoded: {short(str(error))}") from None


def has_more_frames(image: "Image") -> bool:
    """Whether the file that `open_image` read this image from has frames after it: an animation, or pages."""
    return bool(image.info.get(_FRAMES))


def read_bytes(stored: StoredImage, column: str | None = None) -> bytes:
    """The encoded bytes of a stored image.

    Raises:
        BadRow: "missing image", "unreadable image" or "image too large".
    """
    content, path = stored.get("bytes"), stored.get("path")
    if content is None and not path:
        raise BadRow("missing image", column, "an image without content and without path")
    if content is None:
        content = _read_file(str(path), column)
    if not content:
        raise BadRow("truncated image", column, f"{_name(stored)} is empty")
    if len(content) > MAX_BYTES:
        raise BadRow("image too large", column, f"{_name(stored)} has {len(content)} bytes")
    return content


def encode_image(image: "Image") -> bytes:
    """A PIL image as PNG, upright: without loss, so that equal pixels are equal bytes.

    Raises:
        ValueError: values whose tones are not known.
    """
    from PIL import ImageOps
    from PIL.Image import fromarray

    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F" or (upright.mode.startswith("I") and upright.mode != "I;16"):
        upright = fromarray(eight_bits(numpy.asarray(upright)))
    if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        upright = upright.convert("RGB")
    buffer = io.BytesIO()
    upright.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def stored_in_memory(value: Any) -> StoredImage | list[StoredImage] | None:
    """A PIL image, or an array or tensor of pixels, as a stored image; several of four dimensions; None if it is
    neither. What cannot be stored keeps its reason for the audit, under the key UNREADABLE."""
    # Who has an image or a tensor has imported its library; text needs neither.
    pillow, torch = sys.modules.get("PIL.Image"), sys.modules.get("torch")
    if pillow is not None and isinstance(value, pillow.Image):
        try:
            return {"bytes": encode_image(value), "path": None}
        except (ValueError, OSError) as error:
            return {"bytes": None, "path": None, UNREADABLE: f"an image of mode {value.mode}: {error}"}
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if not isinstance(value, numpy.ndarray) or value.dtype.kind not in "biuf" or value.ndim not in (2, 3, 4):
        return None
    return [stored_pixels(item) for item in value] if value.ndim == 4 else stored_pixels(value)


def image_identity(stored: StoredImage) -> list[bytes]:
    """What tells two stored images apart, for the cache's key: the bytes, or path, size and time of the last change.
    A file that is not there has no size and no time."""
    content, path = stored.get("bytes"), stored.get("path")
    if content is not None:
        return [content]
    try:
        status = os.stat(str(path))
    except OSError:
        return [str(path).encode()]
    return [str(path).encode(), f"{status.st_size} {status.st_mtime_ns}".encode()]


def _read_file(path: str, column: str | None) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without writer would block for ever
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadRow("unreadable image", column, f"{short(path, MAX_NAME)} is not a file")
            if status.st_size > MAX_BYTES:
                raise BadRow("image too large", column, f"{short(path, MAX_NAME)} has {status.st_size} bytes")
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise BadRow("missing image", column, f"{short(path, MAX_NAME)}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = short(str(getattr(error, "strerror", None) or error))
        raise BadRow("unreadable image", column, f"{short(path, MAX_NAME)}: {reason}") from None


def _upright_rgb(image: "Image") -> "Image":
    from PIL import Image, ImageOps

    with suppress(Exception):  # broken metadata of a sound picture: it is taken as it lies
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow's own conversion cuts at 255: a white page
        image = Image.fromarray(eight_bits(numpy.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        page = Image.new("RGBA", layer.size, "white")
        page.alpha_composite(layer)
        image = page
    return image.convert("RGB")


def _name(stored: StoredImage) -> str:
    return short(stored["path"], MAX_NAME) if stored.get("path") else "the image"


def short(value: Any, limit: int = 80) -> str:
    """The value for a message, at most `limit` characters of it: an image's content is no help to anybody."""
    text = value if isinstance(value, str) else repr(value[:limit] if isinstance(value, bytes) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
