"""Renders a template to a job script: the template with the job's options, the site profile and lib.sh inserted.

A rendered script needs only the package on the node. It is kept in the run's folder: `sbatch` on it submits the same
job again.
"""

import re
import shlex
from collections.abc import Sequence

from orpo_dist.cluster.files import shipped
from orpo_dist.cluster.job import JobRequest, container_runtime, directives
from orpo_dist.cluster.site import SiteProfile
from orpo_dist.errors import UserError

_DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)(?:=(.*))?")
_PLAIN = re.compile(r"[\w./:%@+,=&|*^\[\]~-]+", re.ASCII)
_FINDS_LIBRARY = re.compile(r"here=|source |# shellcheck source=|# sbatch runs a copy")


def render(template: str, job: JobRequest, site: SiteProfile, arguments: Sequence[str]) -> str:
    """The script of `job`. arguments: of the template, a recipe and flags.

    Raises:
        UserError: there is no such template, or options are malformed.
    """
    lines = shipped("slurm", f"{template}.sbatch").read_text("utf-8").splitlines()
    matches = [_DIRECTIVE.fullmatch(line) for line in lines]
    options = directives(job, site, {match[1]: match[2] for match in matches if match})
    title = next(line for line in lines if line.startswith("# "))
    body = lines[max(i for i, match in enumerate(matches) if match) + 1 :]
    function = next(line for line in reversed(body) if line).split()[0]
    script = [
        "#!/usr/bin/env bash",
        title,
        f"# Rendered by `orpo-dist submit` from {template}.sbatch; `sbatch` on this file submits the same job.",
        *(f"#SBATCH --{name}" + ("" if value is None else f"={_directive(value)}") for name, value in options.items()),
        "",
        *_settings(job, site, body),
        "",
        f"# --- site profile: {site.path}",
        *_without_header(site.text),
        "",
        "# --- slurm/lib.sh",
        *_without_header(shipped("slurm", "lib.sh").read_text("utf-8")),
        "",
        f"{function} {shlex.join(arguments)}",
    ]
    return "\n".join(script) + "\n"


def _settings(job: JobRequest, site: SiteProfile, body: list[str]) -> list[str]:
    """The variables that a template sets before it sources lib.sh."""
    settings: dict[str, str] = {}
    for line in body:
        name, equals, value = line.partition("=")
        if equals and name.isupper() and not _FINDS_LIBRARY.match(line):
            settings[name] = re.sub(r"^\$\{[A-Z]+-([^}]*)\}$", r"\1", value)
    if "GPUS" in settings:
        settings |= {"GPUS": str(job.gpus), "PROCESSES": str(job.processes_per_node)}
    if job.config is not None:
        settings["CONFIG"] = job.config
    runtime = container_runtime(job, site)
    if job.container is not None:
        settings |= {"CONTAINER_RUNTIME": str(runtime), "CONTAINER_IMAGE": job.container}
    if job.python is not None and runtime is None:
        settings["PYTHON"] = job.python
    if job.max_restarts is not None:
        settings["MAX_RESTARTS"] = str(job.max_restarts)
    if job.chain is not None:
        settings["CHAIN"] = job.chain
    return [f"{name}={shlex.quote(value) if value else ''}" for name, value in settings.items()]


def _without_header(text: str) -> list[str]:
    """The lines without a leading `# shellcheck` line, which applies to the separate file only."""
    lines = text.rstrip("\n").splitlines()
    return lines[1:] if lines and lines[0].startswith("# shellcheck") else lines


def _directive(value: str) -> str:
    """A value as sbatch reads it: a backslash takes the next character as it is, in quotes too; outside of quotes white
    space ends the option and `#` begins a comment.
    https://github.com/SchedMD/slurm/blob/master/src/sbatch/opt.c (_get_argument)

    Raises:
        UserError: a line break or another control character, which cannot be written.
    """
    if not value.isprintable():
        raise UserError(f"an option of sbatch cannot contain a line break or another control character: {value!r}.")
    if _PLAIN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
