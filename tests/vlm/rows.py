"""A saved tiny vision-language model with a real processor, and preference rows with drawn images."""

import json
from pathlib import Path
from typing import Any

from tests.model.tiny_vlms import drawing, tiny_processor, tiny_vlm

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange"]


def save_vlm(folder: Path, family: str = "llava") -> Path:
    """Model and processor of a family without a video processor, as from_pretrained reads them."""
    tiny_vlm(family).save_pretrained(folder)
    tiny_processor(family).save_pretrained(folder)
    return folder


def swift_and_trl_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """Writes images below `folder`/images and returns rows in TRL's spelling: one image, two, none, in turn."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        names = []
        for number in range((index + 1) % 3):
            name = f"images/{index}-{number}.png"
            drawing(20 + 4 * index, 16 + 3 * number, index + number).save(folder / name)
            names.append(name)
        colour, other = COLOURS[index % 6], COLOURS[(index + 1) % 6]
        parts = [{"type": "image"} for _ in names] + [{"type": "text", "text": f"Which colour, question {index}?"}]
        rows.append(
            {
                "images": names,
                "prompt": [{"role": "user", "content": parts}],
                "chosen": [{"role": "assistant", "content": f"It is {colour}."}],
                "rejected": [{"role": "assistant", "content": f"It may be {other}, may it not?"}],
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
