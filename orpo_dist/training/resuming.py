"""Resumes a run from a checkpoint as if it had not been interrupted. In the order of the calls:

resolve           before the loop: finds the checkpoint, checks that it belongs to this run and fits these ranks
optimizer_made    records what DeepSpeed's universal form loses
loaded            after the Trainer has loaded it: sums since the last log line, fixes for DeepSpeed's loading
restore_rng       the generators of each rank, after the batches trained before have been skipped
evaluation_is_due whether the run was stopped before the evaluation of the checkpoint's step
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
from orpo_dist.run.callbacks import was_evaluated
from orpo_dist.run.resume import check_same_run, check_topology, checkpoint_to_resume
from orpo_dist.training.progress import METRICS, Progress


class Resuming:
    """The checkpoint that a run resumes from, and its state.

    Args:
        run: the run's folder.
        fingerprint: of the run, with its topology (run/fingerprint.py).
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
        """The checkpoint that `asked` selects, None for a fresh start. A collective: every rank must call it.

        Raises:
            UserError: there is no such checkpoint, or it belongs to another run.
        """
        self.checkpoint, self._universal = None, False
        on_first_rank(lambda: self._sweep(bool(asked)))
        folder = checkpoint_to_resume(asked, self._run) if asked else None
        if folder is None:
            return None
        manifest = on_first_rank(lambda: checkpoints.read_manifest(Path(folder)))
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

    def _sweep(self, says: bool) -> None:
        for unfinished in checkpoints.sweep(self._run):
            if says:
                print(f"Removed the unfinished {unfinished.name}.")

    def optimizer_made(self, optimizer: Any) -> None:
        """Called after the optimizer is wrapped and before a checkpoint is loaded into it."""
        if self._environment.sharding.is_zero:
            self._weight_decays = weight_decays(optimizer)

    def loaded(self, optimizer: Any) -> list[Progress]:
        """Called after the Trainer has loaded the checkpoint. Returns the progress to restore: of this rank, or of all
        ranks if the world size has changed; empty for a fresh start."""
        if self.checkpoint is None:
            return []
        if self._universal:
            fix_universal(optimizer, self._weight_decays)
        ranks = [self._environment.world_rank]
        if self._saved_world_size != self._environment.world_size:
            ranks = list(range(self._saved_world_size))
        return [Progress(**torch.load(self.checkpoint / METRICS.format(rank), weights_only=True)) for rank in ranks]

    def restore_rng(self, step: int, restore: Callable[[], None]) -> None:
        """restore: loads the generators from the Trainer's files.

        Raises:
            UserError: the checkpoint has no generators for this rank.
        """
        if self.checkpoint is None:
            return
        rank, world_size = self._environment.world_rank, self._environment.world_size
        if self._saved_world_size != world_size:
            # There is no per-rank state to restore. Each step has the same pairs; dropout masks differ.
            set_seed(self._args.seed + step * world_size + rank)
            return
        file = self.checkpoint / (f"rng_state_{rank}.pth" if world_size > 1 else "rng_state.pth")
        if not file.is_file():
            raise UserError(
                f"{file} is missing, so the run cannot be resumed exactly (save_only_model leaves it out). To start "
                "from the checkpoint's weights alone, pass it as --model_name_or_path."
            )
        restore()

    def evaluation_is_due(self, state: TrainerState, has_rows: bool) -> bool:
        """Whether the checkpoint's step ends with an evaluation that is missing from the log: the run was stopped
        before it, or killed between a checkpoint and the end of the epoch."""
        if self.checkpoint is None or not has_rows or was_evaluated(state):
            return False
        args = self._args
        if args.eval_strategy == IntervalStrategy.STEPS:
            return state.global_step % state.eval_steps == 0 and state.global_step >= args.eval_delay
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        return args.eval_strategy == IntervalStrategy.EPOCH and ends_epoch and state.epoch >= args.eval_delay
