"""Writes the checkpoints of a run on all ranks: stage, flush, seal, publish with one rename.

RUN/_saving/checkpoint-N   the Trainer's files and `metrics_RANK.pt`, written by every rank
flush                      by the first rank of each node: a node can only flush its own writes
checksums                  each rank reads a share of the files
seal, rename, rotate       by the first rank (run/checkpoint.py)

With `async_save` the ranks only copy their files to host memory (training/deferred_writes.py). A thread of each writes
them and goes through the same steps; the threads meet in a process group of their own.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerState
from transformers.trainer_utils import HubStrategy

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Environment
from orpo_dist.distributed.log import get_logger
from orpo_dist.distributed.timeouts import START_SECONDS
from orpo_dist.distributed.together import Together, background_group
from orpo_dist.errors import SaveError, UserError
from orpo_dist.run import checkpoint as checkpoints
from orpo_dist.run.checksums import checksums, share
from orpo_dist.run.owner import check_owner
from orpo_dist.training.background import Background
from orpo_dist.training.deferred_writes import DeferredWrites
from orpo_dist.training.progress import METRICS, Progress

logger = get_logger(__name__)
Result = TypeVar("Result")
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class _Save:
    """What a thread needs to know of a checkpoint: the trainer's state goes on meanwhile.

    keep: the best checkpoint. limit: how many to keep.
    """

    run: Path
    step: int
    keep: Path | None
    limit: int | None

    @property
    def staged(self) -> Path:
        return self.run / checkpoints.STAGING / f"checkpoint-{self.step}"


class CheckpointWriter:
    """Writes the checkpoints of one run.

    Args:
        args: of the trainer; save_total_limit and async_save are read at each save.
        fingerprint: of the run (run/fingerprint.py).

    Attributes:
        staging: the folder that the Trainer writes into during a save, else None.
        background: the save that is not finished yet, with `async_save`.
    """

    def __init__(self, args: ORPOConfig, fingerprint: dict[str, Any], environment: Environment):
        self._args, self._fingerprint, self._environment = args, fingerprint, environment
        self._deferred: DeferredWrites | None = None
        self._beside: Together | None = None
        self.staging: Path | None = None
        self.background = Background()
        if args.async_save and args.push_to_hub and args.hub_strategy != HubStrategy.END:
            logger.warning(
                "async_save: each save is uploaded (hub_strategy=%s) and has to be written first, so training waits "
                "for it. With hub_strategy=end it does not.",
                HubStrategy(args.hub_strategy).value,
            )

    def save(self, run: Path, state: TrainerState, write: Callable[[], None], progress: Progress) -> Path:
        """Write RUN/checkpoint-N for step N. A collective: every rank must call it.

        With `async_save` it returns when the files have been copied: `background.wait()` tells when the checkpoint is
        there. The save before this one is waited for.

        Args:
            write: writes the Trainer's files below `staging`.
            progress: this rank's sums since the last log line, saved in `metrics_RANK.pt`.

        Returns:
            The folder that is, or will be, published.

        Raises:
            SaveError: it could not be written, or the one before it could not; earlier checkpoints are intact.
            UserError: the run's folder is not shared by all nodes, or another run has taken it over.
        """
        self.background.wait()
        with _making_room(run):
            return self._save(run, state, write, progress)

    def _save(self, run: Path, state: TrainerState, write: Callable[[], None], progress: Progress) -> Path:
        ranks, step = Together(), state.global_step
        staged = run / checkpoints.STAGING / f"checkpoint-{step}"
        ranks.first(lambda: _try(lambda: _begin(staged, run), run, step))

        def write_all() -> None:
            write()
            staged.mkdir(parents=True, exist_ok=True)
            torch.save(vars(progress), staged / METRICS.format(self._environment.world_rank))

        if self._args.async_save and self._deferred is None:
            group = background_group(max(START_SECONDS, self._args.save_timeout))
            self._deferred, self._beside = DeferredWrites(), Together(group)
        deferred = self._deferred if self._args.async_save else None
        with self._staging_below(staged.parent), deferred.collecting() if deferred is not None else nullcontext():
            ranks.each(lambda: _try(write_all, run, step))
        keep = ranks.first(lambda: _try(lambda: _record_best(staged, run, state), run, step))
        # On every rank: under ZeRO all ranks load the best one. Rank 0 looks for it, because another node may see a
        # renamed folder later, and a rank that finds none would not take part in loading it.
        state.best_model_checkpoint = str(keep) if keep is not None else state.best_model_checkpoint
        save = _Save(run, step, keep, self._args.save_total_limit)
        if deferred is None or self._beside is None:
            self._finish(save, ranks)
        else:
            beside = self._beside
            self.background.start(lambda: self._finish(save, beside, deferred))
        return run / staged.name

    def settle(self) -> None:
        """Give the save in flight its time to finish, after an error elsewhere. Its own is only told."""
        try:
            if not self.background.wait(self._args.ddp_timeout):
                logger.error("The checkpoint that is being written does not become complete.")
        except Exception as error:
            logger.error("%s", error)

    @contextmanager
    def _staging_below(self, folder: Path) -> Iterator[None]:
        self.staging = folder
        try:
            yield
        finally:
            self.staging = None

    def _finish(self, save: _Save, ranks: Together, deferred: DeferredWrites | None = None) -> None:
        """From staged files, or files in memory, to the published checkpoint. Every rank takes part."""
        with _making_room(save.run):
            self._finish_together(save, ranks, deferred)

    def _finish_together(self, save: _Save, ranks: Together, deferred: DeferredWrites | None) -> None:
        run, step, staged = save.run, save.step, save.staged
        if deferred is not None:
            ranks.each(lambda: _try(deferred.write, run, step))
        flushes = self._environment.is_first_on_node  # a node can only flush its own writes
        ranks.each(lambda: _try(lambda: checkpoints.flush_tree(staged), run, step) if flushes else None)
        sizes = ranks.first(lambda: _try(lambda: self._sizes(staged), run, step))
        mine = share(sizes, self._environment.world_rank, self._environment.world_size)
        parts = ranks.each(lambda: _try(lambda: checksums(staged, mine), run, step))
        known = {name: sha for part in parts for name, sha in part.items()}
        ranks.first(lambda: _try(lambda: self._publish(save, known), run, step))

    def _sizes(self, staged: Path) -> dict[str, int]:
        """Of the files of all ranks."""
        missing = [rank for rank in range(self._environment.world_size) if not (staged / METRICS.format(rank)).exists()]
        if missing:
            raise UserError(
                f"The files of rank {missing[0]} are not in {staged}: output_dir must be on a file system that all "
                "nodes share."
            )
        return checkpoints.sizes(staged)

    def _publish(self, save: _Save, known: dict[str, str]) -> None:
        check_owner(save.run)  # again: writing takes long, and _saving is the new owner's then
        checkpoints.seal(save.staged, save.step, self._environment.world_size, self._fingerprint, known)
        checkpoints.publish(save.staged, save.run)
        checkpoints.rotate(save.run, save.limit, save.keep)


def _record_best(staged: Path, run: Path, state: TrainerState) -> Path | None:
    """The best checkpoint, which may be this one. Its final name is recorded: transformers looked for it in the staging
    folder."""
    best = run / f"checkpoint-{state.best_global_step}" if state.best_global_step else None
    if best is None or not (best.exists() or best.name == staged.name):
        return None
    state.best_model_checkpoint = str(best)
    state.save_to_json(str(staged / TRAINER_STATE))
    return best


def _begin(staged: Path, run: Path) -> None:
    check_owner(run)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)


@contextmanager
def _making_room(run: Path) -> Iterator[None]:
    """Remove the files of a checkpoint that could not be written. The ranks have agreed by then that it could not: none
    still writes."""
    try:
        yield
    except SaveError:
        shutil.rmtree(run / checkpoints.STAGING, ignore_errors=True)
        raise


def _try(work: Callable[[], Result], run: Path, step: int) -> Result:
    try:
        return work()
    except Exception as error:
        reason = checkpoints.why_unwritable(error, run)
        if reason is None:
            raise
        whole = [folder.name for folder in checkpoints.checkpoint_folders(run)]
        left = f"{whole[-1]} is whole" if whole else "there is none from before"
        raise SaveError(
            f"Cannot save checkpoint-{step} in {run}: {reason}. Of the earlier checkpoints, "
            f"{left}. Make room (save_total_limit keeps fewer), then --resume_from_checkpoint auto."
        ) from error
