"""Merging an adapter into its base. A checkpoint of a run is verified first; the rest is model/loading/merge.py."""

from pathlib import Path

from orpo_dist.errors import UserError
from orpo_dist.model.loading import merge
from orpo_dist.run.checkpoint import MARKER
from orpo_dist.run.checkpoint import verify as verify_files


def merge_run(
    run_folder: str | Path,
    output: str | Path | None = None,
    dtype: str | None = None,
    verify: bool = True,
    *,
    trust_remote_code: bool = False,
) -> merge.MergeReport:
    """Merge the adapter of a run, or of one of its checkpoints, into its base: see model/loading/merge.py.

    Raises:
        UserError: the checkpoint is damaged; and what is said there.
    """
    if (Path(run_folder) / MARKER).is_file():
        try:
            verify_files(Path(run_folder))
        except ValueError as reason:
            raise UserError(f"{run_folder} is a checkpoint that is damaged: {reason}. Merge another one.") from reason
    return merge.merge_run(run_folder, output, dtype, verify, trust_remote_code=trust_remote_code)
