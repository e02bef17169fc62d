"""The resources that a job requests from SLURM, and their checks before submission."""

import re
from dataclasses import dataclass, field

from orpo_dist.cluster.site import SiteProfile, gpu_option, sbatch_options
from orpo_dist.errors import UserError

# SLURM may send its signal this much early.
SIGNAL_EARLY_SECONDS = 60
LEAST_TRAINING_SECONDS = 30
TEMPLATES = (
    "single_node",
    "multi_node",
    "multi_node_sharded",
    "vlm_multi_node",
    "sweep",
    "multi_node_pyxis",
    "multi_node_apptainer",
    "prefetch",
)
_RUNTIMES = {"pyxis": "multi_node_pyxis", "apptainer": "multi_node_apptainer"}
_SHARDED = ("zero3", "zero3_qlora", "zero3_hpz", "zero3_offload", "fsdp2", "fsdp2_qlora", "fsdp2_hsdp", "fsdp2_offload")


@dataclass(frozen=True)
class JobRequest:
    """One job. None: the template's or the cluster's default.

    Attributes:
        gpus: per node; 0 trains on the CPU.
        processes: per node; None is one per GPU.
        time: as SLURM writes it.
        chain: name of its chain of jobs, which run one after the other instead of being requeued.
        python: the interpreter on the nodes, outside of containers.
        stop_before: seconds before the time limit at which the run stops with a checkpoint.
        share_nodes: other jobs may use free resources on its nodes.
        options: further options of sbatch, without dashes.
    """

    name: str
    nodes: int = 1
    gpus: int = 8
    processes: int | None = None
    cpus: int | None = None
    time: str = "24:00:00"
    stop_before: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    dependency: str | None = None
    array: str | None = None
    exclude: str | None = None
    container: str | None = None
    container_runtime: str | None = None
    config: str | None = None
    template: str | None = None
    max_restarts: int | None = None
    chain: str | None = None
    python: str | None = None
    share_nodes: bool = False
    options: dict[str, str | None] = field(default_factory=dict)

    @property
    def processes_per_node(self) -> int:
        return self.processes or max(self.gpus, 1)

    @property
    def signal_seconds(self) -> int:
        """At most ten minutes, at most a quarter of the time limit."""
        return self.stop_before or min(600, seconds_of(self.time) // 4)


def check_request(job: JobRequest) -> None:
    """Raises UserError for values that cannot work on any cluster."""
    for name, value, least in (
        ("--nodes", job.nodes, 1),
        ("--gpus-per-node", job.gpus, 0),
        ("--processes-per-node", job.processes_per_node, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value}: must be at least {least}.")
    if job.gpus and job.processes_per_node > job.gpus:
        raise UserError(
            f"--processes-per-node {job.processes_per_node} with --gpus-per-node {job.gpus}: one GPU per process."
        )
    limit, stop = seconds_of(job.time), job.signal_seconds
    least = stop + SIGNAL_EARLY_SECONDS + LEAST_TRAINING_SECONDS
    if limit < least:
        raise UserError(
            f"--time {job.time} is too short: the run stops {stop} s before its end to save a checkpoint "
            f"(--stop-before), SLURM may send that signal {SIGNAL_EARLY_SECONDS} s early, and training needs some "
            f"time too. Use at least {-(-least // 60)} minutes."
        )
    if job.template is not None and job.template not in TEMPLATES:
        raise UserError(f"--template {job.template}: the templates are {', '.join(TEMPLATES)}.")
    if job.template == "single_node" and job.nodes > 1:
        raise UserError(f"--template single_node with --nodes {job.nodes}: use multi_node.")
    if job.container_runtime is not None and job.container_runtime not in _RUNTIMES:
        raise UserError(f"--container-runtime {job.container_runtime}: pyxis or apptainer.")


def choose_template(job: JobRequest, site: SiteProfile, *, images: bool) -> str:
    """The template of a job, chosen by its options unless it names one."""
    if job.template:
        return job.template
    if job.array:
        return "sweep"
    runtime = container_runtime(job, site)
    if runtime:
        return _RUNTIMES[runtime]
    if job.nodes == 1:
        return "single_node"
    if images:
        return "vlm_multi_node"
    return "multi_node_sharded" if job.config in _SHARDED else "multi_node"


def container_runtime(job: JobRequest, site: SiteProfile) -> str | None:
    """pyxis or apptainer, from the request, the image's name or the site profile; None without a container."""
    if job.container_runtime:
        return job.container_runtime
    if job.container is None:
        return site.container_runtime or None
    if job.container.endswith(".sif"):
        return "apptainer"
    return site.container_runtime or "pyxis"


def directives(job: JobRequest, site: SiteProfile, of_template: dict[str, str | None]) -> dict[str, str | None]:
    """The `#SBATCH` options of a job: those of the template, overridden by the site's, then by the request.

    Raises:
        UserError: malformed options of the site profile.
    """
    options = dict(of_template)
    uses_gpus = options.pop("gpus-per-node", None) is not None
    asked = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "cpus-per-task": str(job.cpus) if job.cpus else None,
        "time": job.time,
        "partition": job.partition or site.partition,
        "account": job.account or site.account,
        "qos": job.qos or site.qos,
        "constraint": job.constraint or site.constraint,
        "dependency": job.dependency,
        "array": job.array,
        "exclude": job.exclude,
    }
    options |= sbatch_options(site.sbatch.split(), f"{site.path}: SITE_SBATCH")
    options |= {name: value for name, value in asked.items() if value}
    if "signal" in options:
        options["signal"] = f"B:USR1@{job.signal_seconds}"
    if uses_gpus and job.gpus:
        name, value = gpu_option(site, job.gpus)
        options[name] = value
    if job.share_nodes:
        options.pop("exclusive", None)
    if job.chain:
        options.pop("requeue", None)
        options["no-requeue"] = None
    return options | job.options


def seconds_of(time: str) -> int:
    """A time limit of SLURM in seconds: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        UserError: another format, or not above zero.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time.strip())
    if match is None:
        raise UserError(f"--time {time}: write it as SLURM does, such as 30 (minutes), 04:00:00 or 2-00:00:00.")
    days, *parts = match.groups()
    first, second, third = (int(part) if part else 0 for part in parts)
    if days is not None:
        total = int(days) * 86400 + first * 3600 + second * 60 + third
    elif parts[2] is not None:
        total = first * 3600 + second * 60 + third
    else:
        total = first * 60 + second
    if total <= 0:
        raise UserError(f"--time {time} is not a duration: it must be above zero.")
    return total
