"""`orpo-dist convert-checkpoint CHECKPOINT`: let a DeepSpeed run continue with another number of processes."""

import argparse
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from orpo_dist.distributed.zero import safe_pickles
from orpo_dist.errors import UserError
from orpo_dist.run import checkpoint as checkpoints


def main(argv: Sequence[str]) -> int:
    """`orpo-dist convert-checkpoint`. Returns 0 when the checkpoint can be resumed on any number of ranks."""
    parser = argparse.ArgumentParser(
        prog="orpo-dist convert-checkpoint",
        allow_abbrev=False,
        description="Add DeepSpeed's universal form to a ZeRO checkpoint, in place. Then restart the run on another "
        "number of processes with the same global batch and --resume_from_checkpoint auto.",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N folder of a run under ZeRO 1, 2 or 3")
    folder = parser.parse_args(argv).checkpoint
    convert(folder)
    print(f"{folder} can be resumed on any number of processes.")
    return 0


def convert(folder: Path) -> Path:
    """Add the universal form, which DeepSpeed can load on any number of ranks, to a checkpoint. The marker is rewritten
    at the end, so an interrupted conversion changes nothing.

    Raises:
        UserError: not a complete checkpoint, or not a DeepSpeed checkpoint.
    """
    try:
        manifest = checkpoints.verify(folder)
    except ValueError as reason:
        raise UserError(f"{folder} is not a complete checkpoint: {reason}.") from reason
    partitions = sorted(path for path in folder.glob("global_step*") if path.is_dir() and path.name[11:].isdigit())
    if not partitions:
        raise UserError(
            f"{folder} is not a DeepSpeed checkpoint: there is nothing to convert. Other checkpoints resume on any "
            "number of processes."
        )
    from deepspeed.checkpoint import ds_to_universal

    output = partitions[-1].with_name(f"{partitions[-1].name}_universal")
    with safe_pickles(), redirect_stdout(io.StringIO()):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(partitions[-1]),
                output_folder=str(output),
                num_extract_workers=1,  # in this process, to which safe_pickles applies
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    checkpoints.flush_tree(folder)
    checkpoints.seal(folder, manifest.step, manifest.world_size, manifest.fingerprint)
    return output
