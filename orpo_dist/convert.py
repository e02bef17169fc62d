"""`orpo-dist convert-checkpoint CHECKPOINT`: let a run under DeepSpeed go on with another number of processes."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Returns 0 when the checkpoint can be resumed on any number of ranks."""
    parser = argparse.ArgumentParser(
        prog="orpo-dist convert-checkpoint",
        description="Add DeepSpeed's universal form to a ZeRO checkpoint, in place. Then start the run again with "
        "another number of processes and the same global batch, with --resume_from_checkpoint auto.",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N folder of a run under ZeRO 1, 2 or 3")
    folder = parser.parse_args(argv).checkpoint
    from orpo_dist.runtime.zero import convert

    convert(folder)
    print(f"{folder} can be resumed on any number of processes.")
    return 0
