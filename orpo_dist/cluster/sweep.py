"""The runs of a sweep: a file with a line of flags for each run. `#` begins a comment line; empty lines do not count.

    python -m orpo_dist.cluster.sweep FILE RUN      prints the words of a run's line, each ended by a zero byte

A line is split into words as a shell would, but no shell evaluates it: `$HOME` and `$(date)` stay as they are.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from orpo_dist.errors import BAD_INPUT, FINISHED, UserError
from orpo_dist.options.secrets import split_flags


def runs_of(path: str | Path) -> list[list[str]]:
    """The flags of each run.

    Raises:
        UserError: the file is not there or holds no flags, or a line cannot be split, sets --output_dir, does not begin
            with a flag or holds a secret.
    """
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise UserError(
            f"--sweep {path} does not exist." if isinstance(error, FileNotFoundError) else str(error)
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"--sweep {path} is not a text file in UTF-8.") from None
    lines = [line for line in re.split(r"\r?\n", text) if line.strip() and line.strip()[0] != "#"]
    if not lines:
        raise UserError(f"--sweep {path} contains no flags.")
    return [_words(line, f"--sweep {path}, run {number}") for number, line in enumerate(lines)]


def array(asked: str | None, runs: int) -> str:
    """The array of a job, of which `asked` may select runs. Raises UserError if it names others."""
    if asked is None:
        return f"0-{runs - 1}"
    numbers = [int(number) for number in re.findall(r"\d+", asked.split("%")[0].split(":")[0])]
    if not numbers or max(numbers) >= runs:
        raise UserError(f"--array {asked}: the runs of the sweep are 0 to {runs - 1}.")
    return asked


def _words(line: str, where: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}: {line}") from error
    if split_flags(words)[1]:
        raise UserError(
            f"{where}: the line holds a secret, which the process list would show. Set it in the environment "
            "(HF_TOKEN) or in the recipe."
        )
    if not words[0].startswith("--") or any(word.split("=")[0].replace("-", "_") == "__output_dir" for word in words):
        raise UserError(f"{where}: a line must contain flags, and not --output_dir: {line}")
    return words


def main(argv: Sequence[str]) -> int:
    """Print the words of a run. Returns 0, or 2 after an error message."""
    if len(argv) != 2 or not argv[1].isdigit():
        print("usage: python -m orpo_dist.cluster.sweep FILE RUN", file=sys.stderr)
        return BAD_INPUT
    try:
        runs, number = runs_of(argv[0]), int(argv[1])
        if number >= len(runs):
            raise UserError(f"{argv[0]} has no run {number}: its runs are 0 to {len(runs) - 1}.")
    except UserError as error:
        print(f"orpo-dist: error: {error}", file=sys.stderr)
        return BAD_INPUT
    sys.stdout.write("".join(f"{word}\0" for word in runs[number]))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
