"""`orpo-dist launch`: one command per node that checks the set-up, prints the launcher's command and runs it.

    orpo-dist launch RECIPE.yaml [--field value ...]                                      all GPUs of this machine
    orpo-dist launch --nodes 2 --node-rank 0 --head-address n1 --port 29500 RECIPE.yaml   on each node, with its rank

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
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import yaml

from orpo_dist.cluster.files import accelerate_config
from orpo_dist.cluster.processes import DEFAULT_PORT, Placement, launcher_command, run_launcher
from orpo_dist.cluster.rendezvous import NodeReport, meet
from orpo_dist.errors import FAILED, UserError
from orpo_dist.options.secrets import private_environment, split_flags
from orpo_dist.recipe.preview import RecipePreview, preview
from orpo_dist.version import __version__

# Different versions of these on another node cause different results, or a hang.
SAME_EVERYWHERE = ("torch", "transformers", "accelerate", "peft", "trl", "deepspeed", "bitsandbytes")


def main(argv: Sequence[str]) -> int:
    """`orpo-dist launch`. Returns the most informative exit code (see processes.run_launcher).

    Raises:
        UserError: GPUs, port, head node, run folder or versions do not meet the needs of the run.
    """
    options = _parser().parse_args(argv)
    view = preview(options.recipe, options.flags)
    placement = _placement(options)
    flags = [*options.flags, *(["--use_cpu", "true"] if options.cpu else [])]
    name = options.accelerate_config or choose_config(view, placement.world_size)
    if placement.world_size == 1 and name == "single":
        return _one_process(options.recipe, flags, options.dry_run)
    config = accelerate_config(name)
    public, private = split_flags(flags)
    with tempfile.TemporaryDirectory(prefix="orpo-dist-launch-") as folder:
        config = fitted_config(config, placement, Path(folder), cpu=options.cpu)
        command = launcher_command(name, config, placement, options.recipe, public, options.cpu)
        print(f"orpo-dist: {shlex.join(command)}", file=sys.stderr, flush=True)
        if options.dry_run:
            return 0
        if placement.nodes > 1:
            view.run_folder.mkdir(parents=True, exist_ok=True)
            report = _report(placement, options.recipe, options.flags)
            try:
                meet(report, placement.head, placement.port, view.run_folder, options.wait)
            except UserError as error:  # not the recipe's fault: a restart, another port or another node may help
                print(f"orpo-dist: error (node rank {placement.node_rank}): {error}", file=sys.stderr, flush=True)
                return FAILED
        return run_launcher(command, private_environment(private))


def choose_config(view: RecipePreview, world_size: int) -> str:
    """The accelerate config of a recipe that names none (docs/scaling.md). Adapters fit on every GPU and need only DDP.
    Full fine-tuning shards gradients and optimizer states, which take most of its memory."""
    if world_size == 1:
        return "single"
    if view.trains_adapter or view.quantised:
        return "ddp"
    return "zero2" if find_spec("deepspeed") else "fsdp2"


def _placement(options: argparse.Namespace) -> Placement:
    if options.nodes < 1 or not 0 <= options.node_rank < options.nodes:
        raise UserError(
            f"--nodes {options.nodes} --node-rank {options.node_rank}: the node ranks of N nodes are 0 to N - 1."
        )
    if options.nodes > 1 and not options.head_address:
        raise UserError("--head-address is missing: the name or address of the node with --node-rank 0.")
    return Placement(
        options.nodes, options.node_rank, options.head_address or "localhost", options.port, _processes(options)
    )


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


def _one_process(recipe: str, flags: list[str], dry_run: bool) -> int:
    command = [sys.executable, "-m", "orpo_dist.cli", "train", recipe, *split_flags(flags)[0]]
    print(f"orpo-dist: {shlex.join(command)}", file=sys.stderr, flush=True)
    if dry_run:
        return 0
    from orpo_dist.train import main as train

    return train([recipe, *flags])


def fitted_config(config: Path, placement: Placement, folder: Path, *, cpu: bool = False) -> Path:
    """The accelerate config adapted to this run; written to `folder` if it differs.

    It sets the CPU, since accelerate's flag for that starts only one process, and the size of a node for weights that
    are sharded within a node (HSDP, ZeRO++ hpZ)."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    before = json.dumps(settings)
    if cpu:
        settings["use_cpu"] = True
    if "parallelism_config" in settings:
        settings["parallelism_config"] |= {
            "parallelism_config_dp_replicate_size": placement.nodes,
            "parallelism_config_dp_shard_size": placement.processes,
        }
    deepspeed = settings.get("deepspeed_config", {}).get("deepspeed_config_file")
    if deepspeed is not None:
        # Look beside the config first: the path in it is relative to a checkout.
        file = config.parent / Path(deepspeed).name
        options = json.loads((file if file.is_file() else Path(deepspeed)).read_text(encoding="utf-8"))
        if "zero_hpz_partition_size" in options.get("zero_optimization", {}):
            options["zero_optimization"]["zero_hpz_partition_size"] = placement.processes
        (folder / file.name).write_text(json.dumps(options, indent=2), encoding="utf-8")
        settings["deepspeed_config"]["deepspeed_config_file"] = str(folder / file.name)
    if json.dumps(settings) == before:
        return config
    (folder / config.name).write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / config.name


def _report(placement: Placement, recipe: str, flags: Sequence[str]) -> NodeReport:
    digest = hashlib.sha256(Path(recipe).read_bytes() + "\0".join(flags).encode()).hexdigest()
    versions = {"python": ".".join(platform.python_version_tuple()[:2]), "orpo-dist": __version__}
    for name in SAME_EVERYWHERE:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return NodeReport(placement.node_rank, placement.nodes, placement.processes, name, versions, digest)


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
    parser.add_argument("--nodes", type=int, default=1, help="Nodes of the run. Default: 1.")
    parser.add_argument("--node-rank", type=int, default=0, help="This node's number, from 0. Default: 0.")
    parser.add_argument("--head-address", help="Name or address of node rank 0, for several nodes.")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"Free port of the head. Default: {DEFAULT_PORT}."
    )
    parser.add_argument("--processes-per-node", type=int, help="Default: one per GPU of this node.")
    parser.add_argument(
        "--accelerate-config", metavar="NAME|FILE", help="zero2, zero3, ... or a file. Default: chosen."
    )
    parser.add_argument("--cpu", action="store_true", help="Train on the CPU.")
    parser.add_argument("--wait", type=float, default=300, help="Seconds to wait for other nodes. Default: 300.")
    parser.add_argument("--dry-run", action="store_true", help="Check this node, print the command and stop.")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...")
    return parser
