"""Tones of drawn ramps: what counts from 0 to full scale arrives as 0 to 255."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from orpo_dist.errors import BadRow
from orpo_dist.images.decode import encode_image, open_image, stored_in_memory
from orpo_dist.images.pixels import UNREADABLE, eight_bits, pixels_in_lists
from orpo_dist.images.source import ImageSource
from tests.images.pictures import encoded, gradient, stored

RAMP = np.arange(256)  # 8 bits
TONES = np.tile(RAMP.astype(np.uint8), (4, 1))


def ramp(top: float, dtype) -> np.ndarray:
    """Four rows from 0 to `top`, 256 wide."""
    return np.tile((RAMP / 255 * top).astype(np.float64), (4, 1)).astype(dtype)


def tones(image) -> np.ndarray:
    return np.asarray(image)[:, :, 0].astype(int)


@pytest.mark.parametrize("top", [255, 4095, 65535])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64, np.float32, np.float64])
def test_ramps_in_arrays(top, dtype):
    assert np.abs(eight_bits(ramp(top, dtype)).astype(int) - TONES).max() <= 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_up_to_one(dtype):
    assert np.array_equal(eight_bits(ramp(1, dtype)), TONES)


def test_types_of_eight_bits_and_one():
    assert np.array_equal(eight_bits(TONES), TONES)
    assert eight_bits(np.array([[True, False]])).tolist() == [[255, 0]]


def test_sixteen_bits_round_as_before():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(eight_bits(every), (every // 257).astype(np.uint8))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[-1.0, 1.0]]), "lie between -1 and 1"),
        (np.array([[0, 70_000]]), "lie between 0 and 70000"),
        (np.array([[-3, 4]], np.int16), "lie between -3 and 4"),
        (np.array([[0.0, np.nan]]), "not all finite"),
        (np.array([[0.0, np.inf]]), "not all finite"),
        (np.array([["a"]]), "not a type of pixels"),
    ],
)
def test_what_has_no_known_tones(values, reason):
    with pytest.raises(ValueError, match=reason):
        eight_bits(values)


# -- files --


def tiff(array: np.ndarray) -> bytes:
    return encoded(Image.fromarray(array), "TIFF")


@pytest.mark.parametrize("top", [255, 4095, 65535])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_ramps_in_tiff(top, dtype):
    assert np.abs(tones(open_image(stored(tiff(ramp(top, dtype))))) - TONES).max() <= 1


@pytest.mark.parametrize("top", [4095, 65535])
def test_ramps_in_png(top):
    content = encoded(Image.fromarray(ramp(top, np.uint16)))
    assert np.abs(tones(open_image(stored(content))) - TONES).max() <= 1


def test_a_float_tiff_up_to_one():
    assert np.array_equal(tones(open_image(stored(tiff(ramp(1, np.float32))))), TONES)


def test_a_tiff_whose_tones_are_not_known():
    with pytest.raises(BadRow, match="lie between -1 and 1") as caught:
        open_image(stored(tiff(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8))))
    assert caught.value.kind == "unreadable image"


def colours_of_16_bits(top: int) -> bytes:
    """A PNG of 16 bits per colour, which Pillow reads and does not write."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = np.repeat(ramp(top, np.uint16)[:, :, None], 3, axis=2).astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 256, 4, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_sixteen_bits_per_colour():
    assert np.abs(tones(open_image(stored(colours_of_16_bits(65535)))) - TONES).max() <= 1
    with pytest.raises(BadRow, match="only the lower 12 are used"):
        open_image(stored(colours_of_16_bits(4095)))


# -- in memory --


@pytest.mark.parametrize("top", [255, 4095, 65535])
@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_ramps_in_pillow_images(mode, top):
    dtype = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
    image = Image.fromarray(ramp(top, dtype))
    assert image.mode == mode
    assert np.abs(tones(open_image(stored(encode_image(image)))) - TONES).max() <= 1


PICTURE = np.asarray(gradient())
SPELLINGS = {
    "rows, columns, channels": PICTURE,
    "channels first": PICTURE.transpose(2, 0, 1),
    "floats": PICTURE.astype(np.float32) / 255,
    "floats, channels first": (PICTURE.astype(np.float32) / 255).transpose(2, 0, 1),
    "16 bits": PICTURE.astype(np.uint16) * 257,
    "tensor": torch.tensor(PICTURE),
    "tensor, channels first": torch.tensor(PICTURE).permute(2, 0, 1),
    "tensor of floats": torch.tensor(PICTURE).permute(2, 0, 1) / 255,
    "tensor that needs a gradient": (torch.tensor(PICTURE) / 255).requires_grad_(),
}


@pytest.mark.parametrize("what", SPELLINGS)
def test_arrays_and_tensors(what):
    assert np.array_equal(np.asarray(open_image(stored_in_memory(SPELLINGS[what]))), PICTURE)


def test_an_array_of_several_images():
    images = stored_in_memory(np.stack([PICTURE, PICTURE[::-1]]))
    assert [np.array_equal(np.asarray(open_image(image)), PICTURE) for image in images] == [True, False]


def test_bfloat16_and_grey():
    assert np.abs(tones(open_image(stored_in_memory(torch.tensor(ramp(1, np.float32)).bfloat16()))) - TONES).max() <= 1
    for shape in ((1, 4, 256), (4, 256, 1)):
        assert np.array_equal(tones(open_image(stored_in_memory(TONES.reshape(shape)))), TONES)


@pytest.mark.parametrize("array", [np.zeros((5, 6, 7)), torch.full((3, 4, 4), -1.0), np.zeros((0, 4, 3))])
def test_an_array_that_is_not_an_image_keeps_its_reason(array):
    image = stored_in_memory(array)
    assert image["bytes"] is None and image[UNREADABLE]
    with pytest.raises(BadRow) as caught:
        ImageSource().stored(image, "images", None)
    assert caught.value.kind == "unreadable image" and "an array of" in caught.value.reason


def test_other_values_are_not_images():
    for value in (np.zeros(3), np.array([["a"]]), torch.zeros(3), "a.png", 7, None):
        assert stored_in_memory(value) is None


# -- nested lists, as `datasets` stores arrays --


def test_nested_lists():
    given = ImageSource().stored(PICTURE.tolist(), "images", None)
    assert [np.array_equal(np.asarray(open_image(image)), PICTURE) for image in given] == [True]
    two = ImageSource().stored([PICTURE.tolist(), PICTURE[:9].tolist()], "images", None)
    assert [open_image(image).size for image in two] == [(40, 30), (40, 9)]


def test_lists_that_are_not_pixels():
    assert pixels_in_lists(["a.png"]) == pixels_in_lists([]) == pixels_in_lists([[]]) == pixels_in_lists([1, 2]) == []
    with pytest.raises(BadRow, match="an array of object") as caught:
        ImageSource().stored([[1, 2], [3]], "images", None)
    assert caught.value.kind == "unreadable image"


def test_an_opened_file_of_float_pixels(tmp_path):
    image = Image.open(io.BytesIO(tiff(ramp(1, np.float32))))
    assert np.array_equal(tones(open_image(stored_in_memory(image))), TONES)
