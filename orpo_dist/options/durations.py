"""Durations as people write them: 5400, 1h30m, HH:MM:SS."""

import re

from orpo_dist.errors import UserError

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds_of(text: str | int | float, option: str = "max_runtime") -> float:
    """A duration in seconds: `5400`, `1h30m`, `90m`, `HH:MM:SS`, `MM:SS` or SLURM's `D-HH:MM:SS`.

    Raises:
        UserError: another spelling, or nothing above zero.
    """
    word = str(text).strip().lower()
    total = None
    if re.fullmatch(r"\d+(\.\d+)?", word):
        total = float(word)
    elif re.fullmatch(r"(\d+(\.\d+)?[dhms])+", word):
        total = sum(float(number) * _UNITS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([dhms])", word))
    elif re.fullmatch(r"(\d+-)?\d+(:\d+){1,2}", word):
        days, _, clock = word.rpartition("-")
        hours, minutes, seconds = ([0] * 3 + [int(part) for part in clock.split(":")])[-3:]
        total = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    if not total:
        raise UserError(f"{option}={text} is not a duration. Write seconds, 1h30m or HH:MM:SS.")
    return float(total)
