"""`orpo-dist launch`: one command per node that checks the set-up, prints the launcher's command and runs it.

    orpo-dist launch RECIPE.yaml [--field value ...]                                      all GPUs of this machine
    orpo-dist launch --nodes 2 --node-rank 0 --head-address n1 --port 29500 RECIPE.yaml   on each node, with its rank
    mpirun --map-by ppr:1:node orpo-dist launch RECIPE.yaml        likewise (schedulers.py)

launch/*.sh and the SLURM templates call it.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml

from orpo_dist.cluster.files import accelerate_config
from orpo_dist.cluster.line import Line
from orpo_dist.cluster.peers import Peers
from orpo_dist.cluster.processes import DEFAULT_PORT, GroupEnd, Placement, launcher_command, run_group, run_launcher
from orpo_dist.cluster.rendezvous import NodeReport, meet
from orpo_dist.cluster.restarts import run_with_restarts
from orpo_dist.cluster.schedulers import find_place, rank_variables
from orpo_dist.data.cache import cache_root, digest
from orpo_dist.errors import FAILED, UserError
from orpo_dist.options.secrets import private_environment, split_flags
from orpo_dist.recipe.preview import RecipePreview, check_row_groups, preview
from orpo_dist.run.stop import raising_on_signals
from orpo_dist.version import __version__

# Different versions of these on another node cause different results, or a hang.
SAME_EVERYWHERE = ("torch", "transformers", "accelerate", "peft", "trl", "deepspeed", "bitsandbytes")


def main(argv: Sequence[str]) -> int:
    """`orpo-dist launch`. Returns the most informative exit code (see processes.run_launcher).

    Raises:
        UserError: GPUs, port, head node, run folder or versions do not meet the needs of the run, or the variables of
            a scheduler contradict each other.
        RunStopped: a signal came before there were processes to forward it to.
    """
    with raising_on_signals():  # while libraries are imported, and while the other nodes are waited for
        return _launch(argv)


def _launch(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    view = preview(options.recipe, options.flags)
    placement, restarts = _placement(options), _max_restarts(options.max_restarts)
    check_row_groups(view, placement.processes)
    flags = [*options.flags, *(["--use_cpu", "true"] if options.cpu else [])]
    public, private = split_flags(flags)
    name = options.accelerate_config or choose_config(view, placement.world_size)
    if placement.world_size == 1 and name == "single":
        command = [sys.executable, "-m", "orpo_dist.cli", "train", options.recipe, *public]
    else:
        config = _lasting_config(accelerate_config(name), placement, cpu=options.cpu)
        command = launcher_command(name, config, placement, options.recipe, public, options.cpu)
    if options.dry_run:
        _print_dry_run(command, private)
        return 0
    print(f"orpo-dist: {shlex.join(command)}", file=sys.stderr, flush=True)
    if restarts and view.values.get("save_only_model"):
        print("orpo-dist: save_only_model: a restart cannot go on from its checkpoints.", file=sys.stderr)
    lines: Mapping[int, Line] = {}
    if placement.nodes > 1:
        _make(view.run_folder)
        report = _report(placement, options, restarts, view.run_folder)
        try:
            lines = meet(report, placement.head, placement.port, view.run_folder, options.wait, keep=restarts > 0)
        except UserError as error:  # not the recipe's fault: a restart, another port or another node may help
            print(f"orpo-dist: error (node rank {placement.node_rank}): {error}", file=sys.stderr, flush=True)
            return FAILED
    if not restarts:
        if command[2] == "orpo_dist.cli":
            return _train_here([options.recipe, *flags])
        return run_launcher(command, private_environment(private))
    asked = str(view.values.get("resume_from_checkpoint") or "")

    def start(resume: Sequence[str], restart: int) -> GroupEnd:
        return run_group([*command, *resume], private_environment(private) | _of_attempt(restart))

    with closing(Peers(lines)) as peers:
        return run_with_restarts(start, restarts, view.run_folder, asked, peers)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the run's folder {folder}: {error.strerror}.") from error


def choose_config(view: RecipePreview, world_size: int) -> str:
    """The accelerate config of a recipe that names none (docs/scaling.md). Adapters fit on every GPU and need only DDP.
    Full fine-tuning shards gradients and optimizer states, which take most of its memory."""
    if world_size == 1:
        return "single"
    if view.trains_adapter or view.quantised:
        return "ddp"
    return "zero2" if find_spec("deepspeed") else "fsdp2"


def _placement(options: argparse.Namespace) -> Placement:
    place = find_place(
        os.environ,
        _hostname(),
        nodes=options.nodes,
        node_rank=options.node_rank,
        head=options.head_address,
        port=options.port,
    )
    if place.nodes < 1 or not 0 <= place.node_rank < place.nodes:
        raise UserError(
            f"--nodes {place.nodes} --node-rank {place.node_rank}: the node ranks of N nodes are 0 to N - 1."
        )
    if place.nodes > 1 and not place.head:
        raise UserError(
            "--head-address is missing: the name or address of the node with --node-rank 0 (launch/multi_node.sh: HEAD)"
            ". MASTER_ADDR is read too."
        )
    head, port = place.head or "localhost", DEFAULT_PORT if place.port is None else place.port
    if not 0 < port < 65536:
        raise UserError(f"--port {port}: ports are 1 to 65535.")
    if place.said_by and place.nodes > 1:
        print(
            f"orpo-dist: node {place.node_rank} of {place.nodes}, head {head}:{port} (from {', '.join(place.said_by)})",
            file=sys.stderr,
        )
    options.processes_per_node = options.processes_per_node or place.processes
    return Placement(place.nodes, place.node_rank, head, port, _processes(options))


def _hostname() -> str:
    """With its domain in a pod, whose head is another pod of the same service."""
    name = socket.gethostname()
    if "JOB_COMPLETION_INDEX" in os.environ and "." not in name:
        whole = socket.getfqdn()
        return whole if whole.startswith(f"{name}.") else name
    return name


def _max_restarts(asked: int | None) -> int:
    """A PyTorchJob's elastic policy sets PET_MAX_RESTARTS for torchrun, whose restarts are replaced by these."""
    text = os.environ.get("PET_MAX_RESTARTS", "")
    count = asked if asked is not None else int(text) if text.isdigit() else 0
    if count < 0:
        raise UserError(f"--max-restarts {count}: it must be at least 0.")
    return count


def _of_attempt(restart: int) -> dict[str, str]:
    """Ranks of an earlier group that are still ending must not join this one."""
    return {"PET_RDZV_ID": f"{os.environ.get('PET_RDZV_ID', 'none')}.{restart}"} if restart else {}


def _processes(options: argparse.Namespace) -> int:
    """Processes of this node: as requested, else one per GPU, or one on a CPU."""
    if options.cpu:
        return options.processes_per_node or 1
    import torch

    seen, asked = torch.cuda.device_count(), options.processes_per_node
    if asked is None:
        if seen == 0 and options.nodes > 1:
            raise UserError(f"{socket.gethostname()} has no visible GPU. To train on the CPU, pass --cpu.")
        return max(seen, 1)
    if asked > max(seen, 1):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        said = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise UserError(
            f"{socket.gethostname()} has {seen} visible GPUs{said}, but {asked} processes are requested: lower "
            "--processes-per-node, make more GPUs visible, or train on the CPU with --cpu."
        )
    return asked


def _train_here(arguments: list[str]) -> int:
    """One process trains in this one, which must not take itself for a rank of an MPI job."""
    from orpo_dist.train import main as train

    before = dict(os.environ)
    for name in rank_variables(before):
        del os.environ[name]
    try:
        return train(arguments)
    finally:
        os.environ.update(before)


def _print_dry_run(command: Sequence[str], private: Sequence[str]) -> None:
    """The command of this node alone on stdout: it can be pasted, or piped into bash."""
    hidden = rank_variables(os.environ)
    without = ["env", *(word for name in hidden for word in ("-u", name))] if hidden else []
    print(shlex.join([*without, *command]))
    names = [word.split("=")[0] for word in private if word.startswith("--")]
    if names:
        print(f"orpo-dist: without the secrets in {', '.join(names)}: add them.", file=sys.stderr)


def _lasting_config(config: Path, placement: Placement, *, cpu: bool) -> Path:
    """`fitted_config` in the cache, under a name of its content: the printed command needs it later.

    Raises:
        UserError: the cache cannot be written.
    """
    beside = sorted(config.parent.glob("*.json"))  # DeepSpeed's settings
    what = [str((placement.nodes, placement.processes, cpu)).encode(), str(config.absolute()).encode()]
    folder = cache_root() / "launch" / digest([*what, *(path.read_bytes() for path in (config, *beside))])
    try:
        return fitted_config(config, placement, folder, cpu=cpu)
    except OSError as error:
        raise UserError(f"Cannot write {folder}: {error}. Set ORPO_DIST_CACHE to a folder with room.") from error


def fitted_config(config: Path, placement: Placement, folder: Path, *, cpu: bool = False) -> Path:
    """The accelerate config adapted to this run; written to `folder` if it differs.

    It sets the CPU, since accelerate's flag for that starts only one process, and the size of a node for weights that
    are sharded within a node (HSDP, ZeRO++ hpZ).

    Raises:
        UserError: the config, or the DeepSpeed config that it names, cannot be read.
    """
    settings = _mapping_of(config)
    before = json.dumps(settings)
    if cpu:
        settings["use_cpu"] = True
    if "parallelism_config" in settings:
        settings["parallelism_config"] |= {
            "parallelism_config_dp_replicate_size": placement.nodes,
            "parallelism_config_dp_shard_size": placement.processes,
        }
    deepspeed = (settings.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if deepspeed is not None:
        # Look beside the config first: the path in it is relative to a checkout.
        file = config.parent / Path(deepspeed).name
        options = _mapping_of(file if file.is_file() else Path(deepspeed))
        if "zero_hpz_partition_size" in (options.get("zero_optimization") or {}):
            options["zero_optimization"]["zero_hpz_partition_size"] = placement.processes
        _write(folder / file.name, json.dumps(options, indent=2))
        settings["deepspeed_config"]["deepspeed_config_file"] = str(folder / file.name)
    if json.dumps(settings) == before:
        return config
    _write(folder / config.name, yaml.safe_dump(settings))
    return folder / config.name


def _mapping_of(path: Path) -> dict[str, Any]:
    """The content of a YAML or JSON file. YAML's parser does not take all JSON: 1e-5 is a text to it."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except RecursionError:
        raise UserError(f"{path} cannot be read: nested too deeply.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: a mapping of names to values is expected.")
    return content


def _write(path: Path, text: str) -> None:
    """By a rename: several nodes may write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _report(placement: Placement, options: argparse.Namespace, restarts: int, run: Path) -> NodeReport:
    recipe = hashlib.sha256(Path(options.recipe).read_bytes() + "\0".join(options.flags).encode()).hexdigest()
    versions = {"python": ".".join(platform.python_version_tuple()[:2]), "orpo-dist": __version__}
    for name in SAME_EVERYWHERE:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return NodeReport(
        placement.node_rank, placement.nodes, placement.processes, name, versions, recipe, restarts, str(run)
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"orpo-dist launch: {message}. Options of launch come before the recipe.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="orpo-dist launch",
        usage="orpo-dist launch [options] RECIPE.yaml [--field value ...]",
        description="Start a run's processes on this node. Options come before the recipe; training's come after it.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, help="Nodes of the run. Default: as the scheduler says, else 1.")
    parser.add_argument("--node-rank", type=int, help="This node's number, from 0. Default: as the scheduler says.")
    parser.add_argument("--head-address", help="Name or address of node rank 0, for several nodes.")
    parser.add_argument("--port", type=int, help=f"Free port of the head. Default: by the job, else {DEFAULT_PORT}.")
    parser.add_argument("--processes-per-node", type=int, help="Default: one per GPU of this node.")
    parser.add_argument(
        "--accelerate-config", metavar="NAME|FILE", help="zero2, zero3, ... or a file. Default: chosen."
    )
    parser.add_argument("--cpu", action="store_true", help="Train on the CPU.")
    parser.add_argument("--wait", type=float, default=300, help="Seconds to wait for other nodes. Default: 300.")
    parser.add_argument(
        "--max-restarts", type=int, metavar="N",
        help="Start again up to N times from the newest checkpoint when a process dies. Default: 0.",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="Check this node, print its command and stop.")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...")
    return parser
