"""The site profile: properties of a cluster, in one shell file (slurm/site.sh) that templates and `submit` read."""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orpo_dist.cluster.files import shipped
from orpo_dist.errors import UserError

# Names of the profile without SITE_, each a field of SiteProfile in lower case.
_NAMES = (
    "PARTITION", "ACCOUNT", "QOS", "CONSTRAINT", "GPU_REQUEST", "SBATCH", "SHARED_FOLDERS", "LOCAL_FOLDERS", "CACHE",
    "CONTAINER_RUNTIME", "SUBMIT",
)  # fmt: skip
SECONDS = 60  # for reading a profile


@dataclass(frozen=True)
class SiteProfile:
    """Values of a profile; an empty string means the cluster's default. `text`: the file itself."""

    path: Path
    text: str
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    gpu_request: str = "--gpus-per-node=%d"
    sbatch: str = ""
    shared_folders: str = ""
    local_folders: str = ""
    cache: str = ""
    container_runtime: str = ""
    submit: str = ""

    def refusal_of(self, folder: Path) -> str | None:
        """Why compute nodes would not see `folder`, or None."""
        shared = self.shared_folders.split()
        if any(_is_below(folder, place) for place in shared):
            return None
        if shared:
            return f"is in none of the shared folders of the site profile ({self.shared_folders})"
        local = next((place for place in self.local_folders.split() if _is_below(folder, place)), None)
        return f"is on {local}, which is local to each node" if local else None


def read_site(path: str | None = None) -> SiteProfile:
    """The profile at `path`, at $ORPO_DIST_SITE, at slurm/site.sh below the current folder, or the shipped one.

    Raises:
        UserError: the file does not exist, or bash cannot read it.
    """
    named = path or os.environ.get("ORPO_DIST_SITE")
    own = Path("slurm/site.sh")
    file = Path(named) if named else own if own.is_file() else shipped("slurm", "site.sh")
    if not file.is_file():
        raise UserError(f"site profile {file} does not exist.")
    text = _text_of(file)
    values = _values_of(file)
    return SiteProfile(file.absolute(), text, **dict(zip(map(str.lower, _NAMES), values, strict=True)))


def _text_of(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"site profile {file} is not a text file in UTF-8.") from None
    except OSError as error:
        raise UserError(f"site profile {file} cannot be read: {error.strerror}.") from None
    if "\r" in text:
        raise UserError(f"site profile {file} has line ends of Windows, which bash does not read: dos2unix {file}.")
    return text


def _values_of(file: Path) -> list[str]:
    """The values of the profile. bash tells whether it can be read, and what the file printed on stderr if its last
    command failed: `[ -d /scratch ] && SITE_SCRATCH=/scratch` may fail and be right."""
    echo = " ".join(f'"${{SITE_{name}-}}"' for name in _NAMES)
    script = f'bash -n "$1" || exit 1; source "$1" >/dev/null; code=$?; printf \'%s\\0\' {echo} "$code"'
    try:
        done = subprocess.run(
            ["bash", "-c", script, "site", str(file)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"site profile {file}: reading it takes longer than {SECONDS} s.") from None
    said = done.stderr.strip().split("\n")[0]
    *values, code = done.stdout.split("\0")[: len(_NAMES) + 1] if done.stdout else [""]
    if len(values) != len(_NAMES) or (code != "0" and said):
        raise UserError(f"site profile {file}: bash cannot read it: {said or 'it ends the shell (exit, set -e)'}")
    return values


def gpu_option(site: SiteProfile, count: int) -> tuple[str, str]:
    """How the site requests GPUs, as (option, value): `("gpus-per-node", "8")`, `("gres", "gpu:a100:8")`.

    Raises:
        UserError: SITE_GPU_REQUEST is not an option with one %d.
    """
    option, _, value = site.gpu_request.removeprefix("--").partition("=")
    if not site.gpu_request.startswith("--") or value.count("%d") != 1:
        raise UserError(
            f"{site.path}: SITE_GPU_REQUEST={site.gpu_request!r} is not an option with a %d, such as --gres=gpu:%d."
        )
    return option, value.replace("%d", str(count))


def sbatch_options(words: Sequence[str], where: str) -> dict[str, str | None]:
    """Further options of sbatch: `--mail-type=END --exclusive` as a mapping.

    Raises:
        UserError: a word that is not an `--option` or `--option=value`.
    """
    options: dict[str, str | None] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"--[A-Za-z][A-Za-z0-9_-]+", name):
            raise UserError(f"{where}: {word!r} is not of the form --option or --option=value.")
        options[name[2:]] = value if equals else None
    return options


def _is_below(folder: Path, place: str) -> bool:
    return folder.is_relative_to(place)
