"""Rows become batches of pairs, and the metrics of a whole set: each pair counts once, for any number of ranks and any
batch size."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from orpo_dist.config import ORPOConfig
from orpo_dist.loss import Objective, pair_sums
from orpo_dist.model.forward import PairForward
from orpo_dist.options.data import PrepareOptions
from orpo_dist.packing.lengths import is_tokenised, pair_costs, pair_lengths, token_counts
from orpo_dist.packing.loader import PairDataLoader, PairDataset
from orpo_dist.packing.sampler import FILLER, EvaluationSampler, GlobalBatchSampler
from orpo_dist.training import refusals
from orpo_dist.training.metrics import MetricSums
from orpo_dist.training.throughput import PairLengths, Throughput

if TYPE_CHECKING:
    from orpo_dist.data.prepare import PreparedPairs


class PairEvaluation(Trainer):
    """The data and evaluation side of `ORPOTrainer`, which sets the attributes below."""

    model: Any
    args: ORPOConfig
    eval_dataset: Any
    objective: Objective
    forward: PairForward
    prepared: "dict[str, PreparedPairs]"
    _processing_class: PreTrainedTokenizerBase | ProcessorMixin
    _tokenizer: PreTrainedTokenizerBase
    _prepare_options: PrepareOptions
    _run_folder: Path
    _throughput: Throughput
    _eval_sums: MetricSums
    _eval_rows: list[tuple[int, float, float]] | None

    # ------------------------------------------------------------------ data

    def _tokenised(self, rows: Any, name: str) -> Any:
        if is_tokenised(rows):
            return rows
        # Imported here: rows that are tokenised already train on a machine without the datasets package.
        from orpo_dist.data.prepare import prepare_pairs

        dropped_rows = self._run_folder / "dropped_rows.jsonl"
        prepared = prepare_pairs(
            rows, self._processing_class, self._prepare_options, name=name, dropped_rows_path=dropped_rows
        )
        self.prepared[name] = prepared
        return prepared.dataset

    def _loader(self, rows: Any, sampler: GlobalBatchSampler | EvaluationSampler) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return PairDataLoader(
            PairDataset(rows, filler_id=self._tokenizer.pad_token_id or 0),
            batch_sampler=sampler,
            collate_fn=self.forward,
            # Of its own: each pass draws a seed for its workers, which must not move the generator of dropout. A run
            # that is resumed makes other passes than one that was not.
            generator=torch.Generator(),
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _costs(self, rows: Any, lengths: list[PairLengths]) -> list[float]:
        costs = pair_costs(lengths, self.model.config.get_text_config().hidden_size)
        per_token = self.forward.vision_cost_per_token
        if not per_token:
            return costs
        images = token_counts(rows, self.model.config.image_token_id)
        return [cost + per_token * tokens for cost, tokens in zip(costs, images, strict=True)]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]
        if rows is None:
            raise refusals.no_evaluation_rows()
        return self.get_test_dataloader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        if not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            self.forward.verify(self.model)
        args, rows = self.args, self._tokenised(test_dataset, "test")
        costs = self._costs(rows, pair_lengths(rows))
        sampler = EvaluationSampler(
            costs, batch_size=args.eval_batch_size, world_size=args.world_size, rank=args.process_index
        )
        return self._loader(rows, sampler)

    # ------------------------------------------------------------------ evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        self.forward.verify(model, may_fall_back=False)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self.forward.run(model, inputs, self.args.device).scores
        self._eval_sums.add(pair_sums(scores, self.objective))
        if self._eval_rows is not None:
            chosen, rejected = scores.chosen_logps.tolist(), scores.rejected_logps.tolist()
            self._eval_rows += zip(inputs["orpo_layout"].index, chosen, rejected, strict=True)
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's loop, with the metrics of the whole set: each pair counts once, for any number of ranks and
        any batch size (the Trainer's own average weights by batches)."""
        wants_rows = self.compute_metrics is not None or description == "Prediction"
        self._eval_sums, self._eval_rows = MetricSums(), [] if wants_rows else None
        with self._throughput.paused():
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        metrics = self._eval_sums.drain(self.accelerator, self.objective)
        predictions: Any = None
        labels: Any = None
        if self._eval_rows is not None:
            rows = sorted(row for row in gather_object(self._eval_rows) if row[0] != FILLER)
            predictions = tuple(np.array([row[side] for row in rows]) for side in (1, 2))
            labels = np.zeros(len(rows))  # as in TRL: a pair has no label beyond its order
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        prefix = f"{metric_key_prefix}_"
        prefixed = {key if key.startswith(prefix) else prefix + key: value for key, value in metrics.items()}
        merged = {**(output.metrics or {}), **prefixed}
        return EvalLoopOutput(predictions, labels, merged, len(cast(PairDataset, dataloader.dataset)))
