"""Going on from a checkpoint as if the run had not been interrupted.

resolve           which checkpoint, does it belong to this run, can these ranks load it; before the loop
optimizer_made    what DeepSpeed's universal form loses is noted
loaded            after the Trainer has loaded it: sums since the last log line, DeepSpeed's faults fixed
restore_rng       each rank's generators, after the batches that were trained already have been skipped
evaluation_is_due whether the checkpoint's step ends with an evaluation that the run was stopped before
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerState, set_seed
from transformers.trainer_utils import IntervalStrategy

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Environment
from orpo_dist.distributed.ranks import on_first_rank
from orpo_dist.distributed.zero import fix_universal, load_universal, weight_decays
from orpo_dist.errors import UserError
from orpo_dist.run import checkpoint as checkpoints
from orpo_dist.run.resume import check_same_run, check_topology, checkpoint_to_resume
from orpo_dist.training.progress import METRICS, Progress


class Resuming:
    """Which checkpoint a run goes on from, and its state.

    Args:
        run: the run's folder.
        fingerprint: what the run is made of (run/fingerprint.py), with its topology.
    """

    def __init__(
        self,
        run: Path,
        args: ORPOConfig,
        fingerprint: dict[str, Any],
        environment: Environment,
        accelerator: Accelerator,
    ):
        self._run, self._args, self._fingerprint = run, args, fingerprint
        self._environment, self._accelerator = environment, accelerator
        self._weight_decays: list[float] = []
        self._universal = False
        self._saved_world_size = environment.world_size
        self.checkpoint: Path | None = None

    def resolve(self, asked: str | bool | None) -> str | None:
        """The checkpoint that `asked` means, None for a fresh start. Every rank must call it; it is a collective.

        Raises:
            UserError: no such checkpoint, or one of another run.
        """
        self.checkpoint, self._universal = None, False
        found = on_first_rank(lambda: self._find(asked))
        if found is None:
            return None
        folder, manifest = found
        world_size, sharding = self._environment.world_size, self._environment.sharding
        check_topology(manifest, sharding.value, world_size, folder)
        if sharding.is_zero:
            self._universal = manifest.world_size != world_size
            load_universal(self._accelerator, self._universal)
        check_same_run(
            manifest,
            self._fingerprint,
            allow_changed=self._args.allow_changed,
            strict_versions=self._args.strict_versions,
        )
        self.checkpoint, self._saved_world_size = Path(folder), manifest.world_size
        return folder

    def _find(self, asked: str | bool | None) -> tuple[str, checkpoints.Manifest] | None:
        for unfinished in checkpoints.sweep(self._run):
            if asked:
                print(f"Removed {unfinished.name}, which was not finished.")
        folder = checkpoint_to_resume(asked, self._run) if asked else None
        return (folder, checkpoints.read_manifest(Path(folder))) if folder is not None else None

    def optimizer_made(self, optimizer: Any) -> None:
        """Called between wrapping the optimizer and loading a checkpoint into it."""
        if self._environment.sharding.is_zero:
            self._weight_decays = weight_decays(optimizer)

    def loaded(self, optimizer: Any) -> list[Progress]:
        """Called once the Trainer has loaded the checkpoint. Returns what this rank takes over from it: its own sums,
        or those of all ranks after a change of the world size; empty for a fresh start."""
        if self.checkpoint is None:
            return []
        if self._universal:
            fix_universal(optimizer, self._weight_decays)
        ranks = [self._environment.world_rank]
        if self._saved_world_size != self._environment.world_size:
            ranks = list(range(self._saved_world_size))
        return [Progress(**torch.load(self.checkpoint / METRICS.format(rank), weights_only=True)) for rank in ranks]

    def restore_rng(self, step: int, restore: Callable[[], None]) -> None:
        """restore: loads the generators of the Trainer's own files.

        Raises:
            UserError: the checkpoint has none for this rank.
        """
        if self.checkpoint is None:
            return
        rank, world_size = self._environment.world_rank, self._environment.world_size
        if self._saved_world_size != world_size:
            # No rank has a state of its own here. The pairs of a step are the same; dropout draws anew.
            set_seed(self._args.seed + step * world_size + rank)
            return
        file = self.checkpoint / (f"rng_state_{rank}.pth" if world_size > 1 else "rng_state.pth")
        if not file.is_file():
            raise UserError(
                f"{file} is missing, so the run cannot go on as it was (save_only_model leaves it out). To start from "
                "the checkpoint's weights alone: --model_name_or_path."
            )
        restore()

    def evaluation_is_due(self, state: TrainerState, has_rows: bool) -> bool:
        """Whether the step of the checkpoint ends with an evaluation that the log does not have: the run was stopped
        before it, or killed between a checkpoint and the end of the epoch."""
        if self.checkpoint is None or not has_rows or _was_evaluated(state):
            return False
        args = self._args
        if args.eval_strategy == IntervalStrategy.STEPS:
            return state.global_step % state.eval_steps == 0 and state.global_step >= args.eval_delay
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        return args.eval_strategy == IntervalStrategy.EPOCH and ends_epoch and state.epoch >= args.eval_delay


def _was_evaluated(state: TrainerState) -> bool:
    return any(
        event["step"] == state.global_step and any(name.startswith("eval_") for name in event)
        for event in state.log_history
    )
