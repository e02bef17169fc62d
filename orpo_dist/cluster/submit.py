"""`orpo-dist submit RECIPE.yaml --nodes N --gpus-per-node G --time T ...`: submits a run as a SLURM job.

Checks the run as far as possible on the login node, renders a template of slurm/ with the site profile, and submits it.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from orpo_dist.cluster import slurm
from orpo_dist.cluster.files import accelerate_config
from orpo_dist.cluster.job import JobRequest, check_request, choose_template, seconds_of
from orpo_dist.cluster.recipe_copy import public_copy
from orpo_dist.cluster.render import render
from orpo_dist.cluster.site import SiteProfile, read_site, sbatch_options
from orpo_dist.cluster.sweep import array, runs_of
from orpo_dist.errors import UserError
from orpo_dist.options.secrets import holds_secret, split_flags, write_private
from orpo_dist.recipe.preview import RecipePreview, check_row_groups, preview, without_gpu

_PATHS = ("dataset_name", "model_name_or_path", "adapter_name_or_path")


@dataclass(frozen=True)
class Submission:
    """A checked job, ready to submit; `scripts` in the order in which they run.

    Attributes:
        recipe_text: of the copy that the job reads, without secrets.
        environment: variables for sbatch: the secrets of recipe and flags, which are in no file of the job.
    """

    run_folder: Path
    recipe: Path
    recipe_text: str
    scripts: dict[str, str]
    notes: list[str]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def main(argv: Sequence[str]) -> int:
    """`orpo-dist submit`. Returns 0 when the job is submitted, or printed with `--dry-run`.

    Raises:
        UserError: the recipe, the resources or the folders cannot work, or SLURM rejects the job.
    """
    options, flags = parse(argv)
    submission = prepare(options, flags)
    for note in submission.notes:
        print(f"orpo-dist: {note}", file=sys.stderr)
    if options.dry_run:
        print("\n".join(submission.scripts.values()), end="")
        return 0
    job_ids = submit(submission, options.dependency, chain=options.chain or 1)
    print("\n".join(what_now(submission, job_ids)))
    return 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of `submit`, and the remaining flags, which belong to the recipe."""
    options, flags = _parser().parse_known_args(argv)
    return options, [word for word in flags if word != "--"]


def prepare(options: argparse.Namespace, flags: list[str]) -> Submission:
    """Check everything and render the scripts. Submits nothing.

    Raises:
        UserError: the recipe, the resources or the folders cannot work.
    """
    site = read_site(options.site)
    view = preview(options.recipe, flags)
    job = _request(options, view)
    check_request(job)
    check_row_groups(view, job.processes_per_node)
    if job.config is not None:
        accelerate_config(job.config)
    runs = len(runs_of(options.sweep)) if options.sweep else None
    if (options.array is not None or runs is not None) and options.chain:
        raise UserError("--chain needs a single run: runs of an array are requeued instead.")
    if options.array is not None and runs is None:
        raise UserError("--array needs --sweep FILE, with a line of flags for each run.")
    if runs is not None:
        job = dataclasses.replace(job, array=array(options.array, runs))
    notes = _check_folders(view, site, sweep=options.sweep)
    notes += _offline_note(view, prefetch=options.prefetch)
    if view.values.get("save_only_model"):
        notes.append("save_only_model: a job that is requeued cannot go on from its checkpoints, and ends with code 2.")
    _refuse_offline_push(view, site)
    if not options.dry_run:
        slurm.check_version()
        job = _fitted(job, site)
        if runs is None:
            _refuse_second_job(view.run_folder, options.dependency)
    _check_recipe(options.recipe, flags)  # last: its imports take seconds
    template = choose_template(job, site, images=view.values.get("image_column") is not None)
    recipe = view.run_folder / "slurm" / "recipe.yaml"
    flags, private = split_flags([*_without_output_dir(flags), "--output_dir", str(view.run_folder)])
    text, environment = public_copy(options.recipe, private)
    if environment:
        notes.append(
            "the secrets of recipe and flags are in no file of the job: sbatch passes them on in its environment (not "
            "with --export=NONE: then log in on the nodes)."
        )
    training = [str(recipe), *([str(Path(options.sweep).absolute())] if options.sweep else []), *flags]
    scripts = {}
    if options.prefetch:
        fetch = dataclasses.replace(
            job, name=f"{job.name}-prefetch", nodes=1, gpus=0, cpus=job.cpus, time=options.prefetch_time, array=None,
            stop_before=None, chain=None, dependency=None,
        )  # fmt: skip
        scripts["prefetch"] = render("prefetch", fetch, site, [str(recipe), *flags])
    scripts["job"] = render(template, job, site, training)
    return Submission(view.run_folder, recipe, text, scripts, notes, environment)


def submit(submission: Submission, dependency: str | None = None, *, chain: int = 1) -> list[str]:
    """Write the scripts and the recipe into the run's folder and submit them. Returns the job ids in running order.

    Raises:
        UserError: SLURM rejects a job.
    """
    folder = submission.recipe.parent
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    # The job reads this copy, so that editing the recipe while the job waits or between attempts does not change it.
    write_private(submission.recipe, submission.recipe_text)
    job_ids: list[str] = []
    for name, script in submission.scripts.items():
        path = folder / f"{name}.sbatch"
        write_private(path, script)
        path.chmod(0o700)
    if "prefetch" in submission.scripts:
        job_ids.append(slurm.sbatch(folder / "prefetch.sbatch", dependency, submission.environment))
        dependency = f"afterok:{job_ids[-1]}"
    for _ in range(chain):
        job_ids.append(slurm.sbatch(folder / "job.sbatch", dependency, submission.environment))
        dependency = f"afterany:{job_ids[-1]}"
    with (folder / "jobs.jsonl").open("a", encoding="utf-8") as file:
        for job_id in job_ids:
            file.write(json.dumps({"job_id": job_id, "submitted": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
    return job_ids


def what_now(submission: Submission, job_ids: list[str]) -> list[str]:
    """Lines for the terminal: ids, logs, how to watch and how to cancel."""
    folder, last = submission.recipe.parent, job_ids[-1]
    return [
        f"Submitted job{'s' if len(job_ids) > 1 else ''} {', '.join(job_ids)}",
        f"run     {submission.run_folder}",
        f"script  {folder / 'job.sbatch'}",
        f"log     {folder / 'logs' / f'{last}.log'}   (the job)",
        f"logs    {folder / 'logs' / f'{last}.*.node*.log'}   (training, a file per attempt and node)",
        f"watch   orpo-dist status {shlex.quote(str(submission.run_folder))}",
        f"cancel  orpo-dist cancel {last}   (saves a checkpoint first)",
    ]


def _without_output_dir(flags: list[str]) -> list[str]:
    """The flags without `--output_dir`, which is added as an absolute path."""
    for position, flag in enumerate(flags):
        name, equals, _ = flag.replace("-", "_").partition("=")
        if name == "__output_dir":
            return flags[:position] + flags[position + (1 if equals else 2) :]
    return flags


def _request(options: argparse.Namespace, view: RecipePreview) -> JobRequest:
    chosen = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(JobRequest)}
    chosen["name"] = options.name or f"orpo-{re.sub(r'[^A-Za-z0-9_.-]+', '-', view.run_folder.name)}"
    chosen["chain"] = str(int(time.time())) if options.chain else None
    chosen["python"] = sys.executable
    logs = str(view.run_folder / "slurm" / "logs").replace("%", "%%")  # SLURM replaces %j and others in names of files
    for option in options.sbatch:
        if holds_secret(option):
            raise UserError(
                f"--sbatch {option.split('=')[0]}: its value would be readable in the job script. Export the variable "
                "before `orpo-dist submit`: sbatch passes it on."
            )
    chosen["options"] = {
        "comment": f"{slurm.COMMENT}{view.run_folder}",
        "chdir": str(Path.cwd()),
        "output": f"{logs}/{'%A_%a.log' if options.sweep else '%j.log'}",
    } | sbatch_options(options.sbatch, "--sbatch")
    return JobRequest(**{name: value for name, value in chosen.items() if value is not None})


def _check_recipe(recipe: str, flags: Sequence[str]) -> None:
    """Check names and values as training will; on the CPU, since a login node has no GPU."""
    from orpo_dist.recipe.recipe import Recipe

    before = dict(os.environ)
    try:
        Recipe.parse([recipe, *flags, *without_gpu(preview(recipe, flags).values)])
    finally:  # the recipe's `env:` applies to the job only
        os.environ.clear()
        os.environ.update(before)


def _check_folders(view: RecipePreview, site: SiteProfile, sweep: str | None) -> list[str]:
    """Raises UserError for folders that compute nodes do not see; returns notes about what may be missing there."""
    refusal = site.refusal_of(view.run_folder)
    if refusal:
        raise UserError(f"output_dir {view.run_folder} {refusal}: set it to a folder that all nodes share.")
    notes = []
    for name in _PATHS:
        value = view.values.get(name)
        path = Path(str(value)).absolute()
        if value is None or not path.exists():
            if value is not None and str(value).startswith(("/", "./", "../", "~")):
                raise UserError(f"{name}: {value} does not exist.")
            continue
        refusal = site.refusal_of(path)
        if refusal:
            raise UserError(f"{name} {path} {refusal}: move it to a folder that all nodes share.")
    current = site.refusal_of(Path.cwd())
    if current:
        notes.append(f"the current folder {Path.cwd()} {current}: the job starts in it and may not find it.")
    if sweep and site.refusal_of(Path(sweep).absolute()):
        raise UserError(f"--sweep {sweep} {site.refusal_of(Path(sweep).absolute())}: move it to a shared folder.")
    if (view.run_folder / "slurm" / "done").exists() and not sweep:
        raise UserError(
            f"{view.run_folder} is already finished (see its run_summary.json). To train again, use another "
            "--output_dir or remove the folder."
        )
    return notes


def _offline_note(view: RecipePreview, *, prefetch: bool) -> list[str]:
    """Jobs train with HF_HUB_OFFLINE=1, so files from the hub must be in the cache before."""
    from huggingface_hub import try_to_load_from_cache

    model = str(view.values.get("model_name_or_path") or "")
    if prefetch or not model or Path(model).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        return []
    cached = try_to_load_from_cache(model, "config.json", cache_dir=view.environment.get("HF_HUB_CACHE"))
    if isinstance(cached, str):
        return []
    return [f"{model} is not in the cache of this node, and jobs train offline: --prefetch fetches it in a job first."]


def _refuse_offline_push(view: RecipePreview, site: SiteProfile) -> None:
    if re.search(r"HF_HUB_OFFLINE=[\"']?0", site.text):
        return
    offline = view.environment.get("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "1"))  # lib.sh's default
    if view.values.get("push_to_hub") and offline.upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(
            "push_to_hub needs the network at the end of the job, and jobs train with HF_HUB_OFFLINE=1: submit with "
            "HF_HUB_OFFLINE=0 if compute nodes have a network, or set push_to_hub=false and upload afterwards."
        )


def _fitted(job: JobRequest, site: SiteProfile) -> JobRequest:
    """The job with a number of CPUs that fits its nodes, unless one was requested.

    Raises:
        UserError: the partition does not have enough nodes, GPUs or hours.
    """
    partition = job.partition or site.partition or None
    groups = slurm.partition_nodes(partition)
    where = f"partition {partition}" if partition else "the default partition"
    fitting = [group for group in groups if group.gpus >= job.gpus]
    if groups and not fitting:
        raise UserError(
            f"--gpus-per-node {job.gpus}: the nodes of {where} have {max(group.gpus for group in groups)} at most."
        )
    count = sum(group.nodes for group in fitting)
    if groups and count < job.nodes:
        raise UserError(f"--nodes {job.nodes}: {where} has {count} nodes with {job.gpus} GPUs.")
    limits = [seconds_of(group.limit) for group in fitting if group.limit[0].isdigit()]
    if limits and seconds_of(job.time) > max(limits):
        raise UserError(f"--time {job.time}: {where} allows {fitting[0].limit}. A longer run continues by itself.")
    if job.cpus is None and fitting:
        cpus = min(group.cpus for group in fitting)
        job = dataclasses.replace(job, cpus=min(cpus, 8 * job.processes_per_node))
    return job


def _refuse_second_job(run_folder: Path, dependency: str | None) -> None:
    active = [job for job in slurm.jobs() if job.is_active and job.run_folder == run_folder]
    if active and not dependency:
        raise UserError(
            f"Job {active[0].job_id} ({active[0].state.lower()}) already trains this run. Cancel it, wait for it "
            f"(--dependency afterany:{active[0].job_id}), or choose another --output_dir."
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"orpo-dist submit: {message}. See orpo-dist submit --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="orpo-dist submit",
        usage="orpo-dist submit RECIPE.yaml [options] [--field value ...]",
        description="Submit a run to SLURM. Flags that are not listed here belong to the recipe.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE.yaml")
    add("--nodes", type=int, help="Default: 1.")
    add("--gpus-per-node", type=int, dest="gpus", help="0 trains on the CPU. Default: 8.")
    add("--processes-per-node", type=int, dest="processes", help="Default: one per GPU.")
    add("--cpus-per-node", type=int, dest="cpus", help="Default: 8 per process, at most what a node has.")
    add("--time", help="Time limit, as SLURM writes it; the run continues in the next attempt. Default: 24:00:00.")
    add("--stop-before", type=int, help="Seconds before the limit to save and stop. Default: 600, at most a quarter.")
    add("--share-nodes", action="store_true", help="Other jobs may use free resources on its nodes.")
    add("--partition")
    add("--account")
    add("--qos")
    add("--constraint")
    add("--exclude", help="Nodes not to use.")
    add("--dependency", help="As sbatch has it, such as afterok:123.")
    add("--sweep", metavar="FILE", help="One run per line of flags, as an array job; runs are in OUTPUT_DIR/0, 1, ...")
    add("--array", help="Which runs of the sweep, and how many at once: 0-7%%2. Default: all.")
    add("--prefetch", action="store_true", help="Fetch model and data in a job before it, without a GPU.")
    add("--prefetch-time", default="04:00:00", help="Time limit of that job. Default: 04:00:00.")
    add("--chain", type=int, help="Submit N jobs, one after the other, for clusters that do not requeue.")
    add("--max-restarts", type=int, help="How often the job may start again. Default: the site profile's.")
    add("--accelerate-config", dest="config", metavar="NAME|FILE", help="Default: chosen by the recipe.")
    add("--template", help="A template of slurm/. Default: by nodes, config, images and container.")
    add("--container", metavar="IMAGE", help="Train in this image.")
    add("--container-runtime", help="pyxis or apptainer. Default: the site profile's, or by the image's name.")
    add("--name", help="Name of the job. Default: orpo- and the run's folder.")
    add("--site", metavar="FILE", help="Site profile. Default: $ORPO_DIST_SITE, slurm/site.sh, the shipped one.")
    add("--sbatch", action="append", default=[], metavar="--OPTION=VALUE", help="Any other option of sbatch.")
    add("--dry-run", action="store_true", help="Check, print the script and submit nothing.")
    return parser
