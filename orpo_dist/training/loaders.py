"""Data loaders for tokenised pairs: which pairs this data rank gets, in which micro-batches."""

from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Environment
from orpo_dist.model.packed.choose_layout import LayoutChoice
from orpo_dist.packing.lengths import PairLengths, pair_costs, pair_lengths, token_counts
from orpo_dist.packing.loader import PairDataLoader, PairDataset
from orpo_dist.packing.sampler import EvaluationSampler, GlobalBatchSampler
from orpo_dist.packing.workers import begin_worker
from orpo_dist.training.refusals import refuse_empty_epoch


class PairLoaders:
    """Builds the loaders of a run.

    Args:
        layout: has the collator, the cost of an image token and the config of the model that trains.
        filler_id: token id for the pairs of weight zero that give every rank the same number of micro-batches.
    """

    def __init__(self, args: ORPOConfig, environment: Environment, layout: LayoutChoice, filler_id: int):
        self._args, self._environment, self._layout, self._filler_id = args, environment, layout, filler_id

    def training(
        self,
        rows: Any,
        lengths: list[PairLengths],
        *,
        global_batch: int,
        micro_batch: int,
        order: "Sampler[int] | None" = None,
    ) -> DataLoader[dict[str, Any]]:
        """Global batches of `global_batch` pairs, cut into micro-batches of about `micro_batch` pairs per data rank.

        order: positions of an epoch's pairs, from a sampler of the user; unset, `train_sampling_strategy` decides.

        Raises:
            UserError: dataloader_drop_last, and there is no whole global batch.
        """
        args, environment = self._args, self._environment
        refuse_empty_epoch(args, len(lengths) if order is None else len(order), global_batch)  # type: ignore[arg-type]
        sampler = GlobalBatchSampler(
            self._costs(rows, lengths),
            global_batch=global_batch,
            accumulation=-(-global_batch // (micro_batch * environment.data_ranks)),
            data_ranks=environment.data_ranks,
            data_rank=environment.data_rank,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            shuffle=args.train_sampling_strategy != "sequential",
            drop_last=args.dataloader_drop_last,
            order=order,
        )
        return self.of(rows, sampler)

    def evaluation(self, rows: Any) -> DataLoader[dict[str, Any]]:
        """Every pair once, over all data ranks."""
        sampler = EvaluationSampler(
            self._costs(rows, pair_lengths(rows)),
            batch_size=self._args.eval_batch_size,
            data_ranks=self._environment.data_ranks,
            data_rank=self._environment.data_rank,
        )
        return self.of(rows, sampler)

    def of(self, rows: Any, sampler: Any) -> DataLoader[dict[str, Any]]:
        """sampler: yields the indices of each micro-batch."""
        args, workers = self._args, self._args.dataloader_num_workers
        return PairDataLoader(
            PairDataset(rows, filler_id=self._filler_id),
            batch_sampler=sampler,
            collate_fn=self._layout.collator,
            # A separate generator: each pass draws a seed for its workers, and must not advance the generator used for
            # dropout. A resumed run makes a different number of passes than an uninterrupted one.
            generator=torch.Generator(),
            num_workers=workers,
            worker_init_fn=begin_worker,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers > 0 else None,
        )

    def _costs(self, rows: Any, lengths: list[PairLengths]) -> list[float]:
        config = self._layout.model_config
        costs = pair_costs(lengths, config.get_text_config().hidden_size)
        per_token = self._layout.vision_cost_per_token
        if not per_token:
            return costs
        images = token_counts(rows, config.image_token_id)
        return [cost + per_token * tokens for cost, tokens in zip(costs, images, strict=True)]
