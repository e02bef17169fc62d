"""Small preference files for the tests of whole runs."""

import json
import random
from pathlib import Path

WORDS = ["reset", "password", "settings", "choose", "security", "follow", "link", "capital", "Paris", "order", "help"]


def write_pairs(path: Path, count: int, seed: int) -> None:
    """`count` pairs that can be learnt (chosen ones start with `yes`), of unequal length, as JSON lines."""
    chance = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(2, longest)))

    rows = [{"prompt": text(12), "chosen": "yes " + text(9), "rejected": "no " + text(9)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
