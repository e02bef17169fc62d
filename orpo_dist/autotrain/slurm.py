"""`AutoTrainProject(backend="slurm")`: an AutoTrain run as a SLURM job, through `orpo-dist submit`."""

import os
import shlex
import sys
from pathlib import Path

import yaml

from orpo_dist.autotrain.local import config_of
from orpo_dist.autotrain.setup import Setup
from orpo_dist.cluster.site import read_site
from orpo_dist.cluster.submit import parse, prepare, submit, what_now


def submit_project(setup: Setup, distributed_backend: str | None, flags: str) -> list[str]:
    """Submit a run with the flags of the site profile (SITE_SUBMIT), followed by `flags`. Returns the job ids.

    Credentials stay in the environment, which sbatch passes to the job.

    Raises:
        UserError: flags, folders or resources cannot work, or SLURM rejects the job.
    """
    recipe = dict(setup.recipe)
    if recipe.pop("auto_find_batch_size", False):
        print("orpo-dist: auto_find_batch_size has no effect with backend=slurm: set batch_size.", file=sys.stderr)
    folder = Path(recipe["output_dir"]).absolute()
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    path = folder / "slurm" / "autotrain.yaml"
    path.write_text(yaml.safe_dump(recipe | {"output_dir": str(folder)}, sort_keys=False), "utf-8")
    words = [str(path), "--name", f"orpo-{folder.name}"]
    if distributed_backend:
        words += ["--accelerate-config", config_of(distributed_backend, recipe)]
    options, rest = parse([*words, *shlex.split(read_site().submit), *shlex.split(flags)])
    submission = prepare(options, rest)
    os.environ.update(setup.environment)
    job_ids = submit(submission, options.dependency, chain=options.chain or 1)
    print("\n".join([*(f"orpo-dist: {note}" for note in submission.notes), *what_now(submission, job_ids)]))
    return job_ids
