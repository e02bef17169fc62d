"""`orpo-dist cancel RUN|JOB ...`: ends a run's jobs, by default with a checkpoint and without a restart."""

import argparse
from collections.abc import Sequence

from orpo_dist.cluster import slurm
from orpo_dist.cluster.status import folder_of
from orpo_dist.errors import UserError


def main(argv: Sequence[str]) -> int:
    """`orpo-dist cancel`. Returns 0.

    Raises:
        UserError: there is no such job, or SLURM rejects the request.
    """
    parser = argparse.ArgumentParser(
        prog="orpo-dist cancel",
        allow_abbrev=False,
        description="End a run's jobs. A running job saves a checkpoint first; submit the recipe again to continue.",
    )
    parser.add_argument("which", nargs="+", metavar="RUN|JOB", help="A run's folder or the id of a job.")
    parser.add_argument("--now", action="store_true", help="Do not wait for a checkpoint.")
    options = parser.parse_args(argv)
    for word in options.which:
        print("\n".join(cancel(word, now=options.now)))
    return 0


def cancel(word: str, *, now: bool = False) -> list[str]:
    """Cancel the jobs of a run, or one job. Returns a line for each.

    Raises:
        UserError: no waiting or running job has that name.
    """
    queued = [job for job in slurm.jobs() if job.run_folder is not None and job.is_active]
    ids = word.replace("_", "").isdigit()
    if ids:
        found = [job for job in queued if word in (job.job_id, job.job_id.split("_")[0])]
    else:
        folder = folder_of(word, queued)
        found = [job for job in queued if job.run_folder is not None and job.run_folder.is_relative_to(folder)]
    if not found:
        raise UserError(f"{word} is not a waiting or running job of orpo-dist (orpo-dist status lists them).")
    # Waiting jobs first, so that none of them starts when another ends.
    return [_cancel_one(job, now=now) for job in sorted(found, key=lambda job: job.state == "RUNNING")]


def _cancel_one(job: slurm.QueuedJob, *, now: bool) -> str:
    if now or job.state != "RUNNING":
        slurm.call("scancel", job.job_id)
        return f"job {job.job_id}: cancelled ({job.state.lower()} until now)"
    assert job.run_folder is not None
    real_id = _own_id(job.job_id)
    (job.run_folder / "slurm" / f"cancel.{real_id}").touch()
    slurm.call("scancel", "--batch", "--signal=USR1", job.job_id)
    return f"job {job.job_id}: saves a checkpoint and ends; `orpo-dist status {job.run_folder}` shows when"


def _own_id(job_id: str) -> str:
    """SLURM_JOB_ID of an array task, which squeue lists as 12_3."""
    if "_" not in job_id:
        return job_id
    return slurm.call("squeue", "--noheader", "--format=%A", f"--jobs={job_id}").strip()
