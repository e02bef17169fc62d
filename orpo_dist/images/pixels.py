"""Numbers -> 8-bit pixels: grey images of more than 8 bits, arrays, tensors, nested lists of numbers.

One rule for the tones, by type and range: 8 bits stay as they are; integers and floats are counted from 0 to the first
of 255, 4,095 (12 bits, which cameras and scanners store in 16) and 65,535 that the largest value does not pass; floats
up to 1 are counted from 0 to 1. Whatever else there is (negative or larger numbers, NaN) has no tones that are known.
"""

import io
from typing import Any

import numpy

UNREADABLE = "unreadable"  # key of a stored image that could not be made, with the reason
FULL_SCALES = (255, 4095, 65535)
_ABOVE_ONE = 1 + 1e-4  # rounding of a resized float image


def eight_bits(values: numpy.ndarray) -> numpy.ndarray:
    """The values as uint8, of the same shape.

    Raises:
        ValueError: values whose tones are not known; the message says which.
    """
    if values.dtype == numpy.uint8:
        return values
    if values.dtype == bool:
        return values.astype(numpy.uint8) * 255
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{values.dtype} is not a type of pixels")
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if not numpy.isfinite([low, high]).all():
        raise ValueError("its values are not all finite")
    if low < (-1e-4 if values.dtype.kind == "f" else 0) or high > FULL_SCALES[-1]:
        raise ValueError(f"its values lie between {low:g} and {high:g}: pixels are 0 to 1, 255, 4095 or 65535")
    if values.dtype.kind == "f":
        scale = 1 if high <= _ABOVE_ONE else next(scale for scale in FULL_SCALES if high <= scale)
        return numpy.rint(values.astype(numpy.float64).clip(0, scale) * (255 / scale)).astype(numpy.uint8)
    scale = next(scale for scale in FULL_SCALES if high <= scale)
    return (values.astype(numpy.int64) * 255 // scale).astype(numpy.uint8)


def stored_pixels(values: numpy.ndarray) -> dict[str, Any]:
    """An array of one image, (H, W), (H, W, channels) or (channels, H, W), as a stored image; {UNREADABLE: reason}
    beside empty places where it is none."""
    from PIL.Image import fromarray

    try:
        image = fromarray(eight_bits(_channels_last(values)))
    except ValueError as error:
        return {"bytes": None, "path": None, UNREADABLE: f"an array of {values.dtype} {values.shape}: {error}"}
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def pixels_in_lists(value: Any) -> list[numpy.ndarray]:
    """The images in nested lists of numbers, which is how `datasets` and JSON hold arrays; none in anything else."""
    depth, first = 0, value
    while isinstance(first, list) and first:
        depth, first = depth + 1, first[0]
    if not 2 <= depth <= 4 or not isinstance(first, bool | int | float):
        return []
    return [_array(item) for item in (value if depth == 4 else [value])]


def _array(value: list[Any]) -> numpy.ndarray:
    try:
        return numpy.array(value)
    except ValueError:  # rows of unequal length
        return numpy.array(None)


def _channels_last(values: numpy.ndarray) -> numpy.ndarray:
    shape = values.shape
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError("one image has rows, columns and channels")
    if len(shape) == 2:
        return values
    if shape[2] in (1, 2, 3, 4):
        return values[:, :, 0] if shape[2] == 1 else numpy.ascontiguousarray(values)
    if shape[0] in (1, 3, 4):
        return values[0] if shape[0] == 1 else numpy.ascontiguousarray(values.transpose(1, 2, 0))
    raise ValueError("neither its first nor its last dimension is that of 1, 3 or 4 channels")
