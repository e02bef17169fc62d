"""Files of one JSON object per line that a run continues when it is resumed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool], added: str = "") -> None:
    """Keep the lines whose object is `wanted`, then add `added`. The file is replaced by one rename.

    A line that is not an object with a whole number as `step` is dropped and named in one printed line: a killed run
    or a full disk leaves partial lines and zero bytes, and they must not end every later start.
    """
    kept, bad = [], []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        event = _event(line)
        if event is None:
            if line.strip():
                bad.append(number)
        elif wanted(event):
            kept.append(line.rstrip(b"\r") + b"\n")
    if bad:
        named = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        print(f"{path}: dropped what is not a log event, in line {named} (left by a run that was killed?).")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(b"".join(kept) + added.encode("utf-8"))
    os.replace(temporary, path)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply to be a log event
        return None
    step = event.get("step") if isinstance(event, dict) else None
    return event if isinstance(step, int) and not isinstance(step, bool) else None
