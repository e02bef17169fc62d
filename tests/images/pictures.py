"""Small pictures, encoded."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    """Different in every corner, so that a turned or mirrored copy shows."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def stored(content: bytes) -> dict:
    return {"bytes": content, "path": None}


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that announces width x height pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
