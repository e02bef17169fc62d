"""Writes the checkpoints of a run on all ranks: stage, flush, seal, publish with one rename.

RUN/_saving/checkpoint-N   the Trainer's files and `metrics_RANK.pt`, written by every rank
flush                      by the first rank of each node: a node can only flush its own writes
checksums                  each rank reads a share of the files
seal, rename, rotate       by the first rank (run/checkpoint.py)
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerState

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Environment
from orpo_dist.distributed.ranks import on_first_rank
from orpo_dist.errors import SaveError, UserError
from orpo_dist.run import checkpoint as checkpoints
from orpo_dist.run.checksums import checksums, share
from orpo_dist.run.owner import check_owner
from orpo_dist.training.progress import METRICS, Progress

Result = TypeVar("Result")
TRAINER_STATE = "trainer_state.json"


class CheckpointWriter:
    """Writes the checkpoints of one run.

    Args:
        args: of the trainer; save_total_limit is read at each save.
        fingerprint: of the run (run/fingerprint.py).

    Attributes:
        staging: the folder that the Trainer writes into during a save, else None.
    """

    def __init__(
        self,
        args: ORPOConfig,
        fingerprint: dict[str, Any],
        environment: Environment,
        accelerator: Accelerator,
    ):
        self._args, self._fingerprint = args, fingerprint
        self._environment, self._accelerator = environment, accelerator
        self.staging: Path | None = None

    def save(self, run: Path, state: TrainerState, write: Callable[[], None], progress: Progress) -> Path:
        """Write RUN/checkpoint-N for step N. A collective: every rank must call it.

        Args:
            write: writes the Trainer's files below `staging`.
            progress: this rank's sums since the last log line, saved in `metrics_RANK.pt`.

        Returns:
            The published folder.

        Raises:
            SaveError: it could not be written; earlier checkpoints are intact.
            UserError: the run's folder is not shared by all nodes, or another run has taken it over.
        """
        staged = run / checkpoints.STAGING / f"checkpoint-{state.global_step}"
        on_first_rank(lambda: _try(lambda: _begin(staged, run), run, state))

        def write_all() -> None:
            write()
            staged.mkdir(parents=True, exist_ok=True)
            torch.save(vars(progress), staged / METRICS.format(self._environment.world_rank))

        with self._staging_below(staged.parent):
            _try(write_all, run, state)
        self._accelerator.wait_for_everyone()
        if self._environment.is_first_on_node:  # a node can only flush its own writes
            _try(lambda: checkpoints.flush_tree(staged), run, state)
        self._accelerator.wait_for_everyone()
        keep, sizes = on_first_rank(lambda: _try(lambda: self._complete(staged, run, state), run, state))
        known = self._checksums(staged, sizes, run, state)
        published, best = on_first_rank(
            lambda: _try(lambda: self._publish(staged, run, state, keep, known), run, state)
        )
        # On every rank: under ZeRO all ranks load the best one. Rank 0 looks for it, because another node may see a
        # renamed folder later, and a rank that finds none would not take part in loading it.
        state.best_model_checkpoint = best or state.best_model_checkpoint
        return Path(published)

    @contextmanager
    def _staging_below(self, folder: Path) -> Iterator[None]:
        self.staging = folder
        try:
            yield
        finally:
            self.staging = None

    def _complete(self, staged: Path, run: Path, state: TrainerState) -> tuple[Path | None, dict[str, int]]:
        """The best checkpoint, which may be this one, and the sizes of the staged files, all of which are there."""
        missing = [rank for rank in range(self._environment.world_size) if not (staged / METRICS.format(rank)).exists()]
        if missing:
            raise UserError(
                f"The files of rank {missing[0]} are not in {staged}: output_dir must be on a file system that all "
                "nodes share."
            )
        best = run / f"checkpoint-{state.best_global_step}" if state.best_global_step else None
        if best is not None and (best.exists() or best.name == staged.name):
            # Record its final name: transformers looked for it in the staging folder.
            state.best_model_checkpoint = str(best)
            state.save_to_json(str(staged / TRAINER_STATE))
            checkpoints.flush(staged / TRAINER_STATE)
        return best, checkpoints.sizes(staged)

    def _checksums(self, staged: Path, sizes: dict[str, int], run: Path, state: TrainerState) -> dict[str, str]:
        """Of all files, on every rank."""
        world_rank, world_size = self._environment.world_rank, self._environment.world_size
        mine = _try(lambda: checksums(staged, share(sizes, world_rank, world_size)), run, state)
        return {name: sha for part in gather_object([mine]) for name, sha in part.items()}

    def _publish(
        self, staged: Path, run: Path, state: TrainerState, best: Path | None, known: dict[str, str]
    ) -> tuple[str, str | None]:
        """The published folder, and the best checkpoint if there is one."""
        checkpoints.seal(staged, state.global_step, self._environment.world_size, self._fingerprint, known)
        published = checkpoints.publish(staged, run)
        checkpoints.rotate(run, self._args.save_total_limit, best)
        return str(published), str(best) if best is not None and best.exists() else None


def _begin(staged: Path, run: Path) -> None:
    check_owner(run)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)


def _try(work: Callable[[], Result], run: Path, state: TrainerState) -> Result:
    try:
        return work()
    except Exception as error:
        reason = checkpoints.why_unwritable(error, run)
        if reason is None:
            raise
        shutil.rmtree(run / checkpoints.STAGING, ignore_errors=True)
        whole = [folder.name for folder in checkpoints.checkpoint_folders(run)]
        left = f"{whole[-1]} is whole" if whole else "there is none from before"
        raise SaveError(
            f"Cannot save checkpoint-{state.global_step} in {run}: {reason}. Of the earlier checkpoints, "
            f"{left}. Make room (save_total_limit keeps fewer), then --resume_from_checkpoint auto."
        ) from error
