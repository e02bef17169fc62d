import io
import os

import numpy as np
import pytest
from PIL import Image

from orpo_dist.errors import BadRow, UserError
from orpo_dist.images import decode as images
from orpo_dist.images.decode import encode_image, has_more_frames, image_identity, open_image, require_pillow
from tests.images.pictures import encoded, gradient, png_of, stored


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats(format):
    image = open_image(stored(encoded(gradient(), format, **({"lossless": True} if format == "WEBP" else {}))))
    assert image.mode == "RGB" and np.array_equal(np.array(image), np.array(gradient()))


def test_a_file(tmp_path):
    gradient().save(tmp_path / "a.jpg", quality=95)
    image = open_image({"bytes": None, "path": str(tmp_path / "a.jpg")})
    assert image.size == (40, 30) and np.abs(np.array(image).astype(int) - np.array(gradient())).mean() < 6


@pytest.mark.parametrize("orientation, turned", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(stored(encoded(gradient(), exif=exif)))
    assert np.array_equal(np.array(image), np.rot90(np.array(gradient()), turned))


def test_broken_exif_is_ignored():
    content = encoded(gradient(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff broken")
    assert open_image(stored(content)).size == (40, 30)


def test_transparent_parts_become_white():
    layer = gradient().convert("RGBA")
    layer.putalpha(Image.new("L", layer.size, 0))
    assert np.array(open_image(stored(encoded(layer)))).min() == 255
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.putpixel((1, 0), 1)
    image = open_image(stored(encoded(palette, transparency=0)))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 10, 10)]


def test_sixteen_bit_grey_is_scaled():
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert np.array(open_image(stored(encoded(grey))))[0, :, 0].tolist() == [0, 100, 255]


def test_of_several_frames_the_first():
    frames = [gradient().convert("P"), Image.new("P", (40, 30))]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    image = open_image(stored(content))
    assert np.array(image).std() > 20 and has_more_frames(image)
    assert not has_more_frames(open_image(stored(encoded(frames[0], "GIF"))))
    phone = encoded(gradient(), "MPO", save_all=True, append_images=[gradient()])  # a photograph and its preview
    assert not has_more_frames(open_image(stored(phone)))


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_formats_of_several_frames(format_name):
    content = encoded(gradient(), format_name, save_all=True, append_images=[Image.new("RGB", (40, 30))])
    assert has_more_frames(open_image(stored(content)))


# -- what cannot be read --


NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
PHOTO = encoded(gradient(200, 200), "JPEG")
BAD = {
    "empty": (b"", "truncated image"),
    "text": (b"<html>404</html>", "unreadable image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unreadable image"),
    "half a PNG": (NOISE[: len(NOISE) // 2], "truncated image"),
    "half a JPEG": (PHOTO[: len(PHOTO) // 2], "truncated image"),
    "a PNG without pixels": (png_of(9, 9), "truncated image"),
    "10 gigapixels": (png_of(100_000, 100_000), "image too large"),
    "100 megapixels": (png_of(10_000, 10_000), "image too large"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_images(what):
    content, kind = BAD[what]
    with pytest.raises(BadRow) as caught:
        open_image(stored(content), "images")
    assert (caught.value.kind, caught.value.column) == (kind, "images")


def test_a_corrupted_pixel_stream():
    broken = bytearray(NOISE)
    broken[len(broken) // 2] ^= 255
    with pytest.raises(BadRow) as caught:
        open_image(stored(bytes(broken)))
    assert caught.value.kind in ("unreadable image", "truncated image")


def test_bad_files(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    for path, kind in (
        (tmp_path / "none.png", "missing image"),
        (tmp_path, "unreadable image"),
        (tmp_path / "pipe.png", "unreadable image"),
        ("/dev/zero", "unreadable image"),
        ("a\0b.png", "unreadable image"),
    ):
        with pytest.raises(BadRow) as caught:
            open_image({"bytes": None, "path": str(path)})
        assert caught.value.kind == kind
    (tmp_path / "large.png").write_bytes(NOISE)
    monkeypatch.setattr(images, "MAX_BYTES", len(NOISE) - 1)
    for large in ({"bytes": None, "path": str(tmp_path / "large.png")}, stored(NOISE)):
        with pytest.raises(BadRow) as caught:
            open_image(large)
        assert caught.value.kind == "image too large"


# -- encoding and identity --


def test_encoding_keeps_pixels_and_turns_the_image_upright():
    assert np.array_equal(np.array(open_image(stored(encode_image(gradient())))), np.array(gradient()))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.open(io.BytesIO(encoded(gradient(), exif=exif)))
    assert open_image(stored(encode_image(lying))).size == (30, 40)
    assert encode_image(gradient()) == encode_image(gradient().copy())
    assert open_image(stored(encode_image(gradient().convert("CMYK")))).size == (40, 30)


def test_identity(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    before = image_identity({"bytes": None, "path": str(path)})
    assert image_identity({"bytes": None, "path": str(path)}) == before
    path.write_bytes(b"three")
    assert image_identity({"bytes": None, "path": str(path)}) != before
    path.unlink()
    assert image_identity({"bytes": None, "path": str(path)}) == [str(path).encode()]
    assert image_identity(stored(b"x")) != image_identity(stored(b"y"))


def test_without_pillow(monkeypatch):
    require_pillow("anything")
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a vision-language model needs Pillow.*orpo-dist\[vlm\]"):
        require_pillow("a vision-language model")
