"""Evaluation and prediction: each pair of a set once, stopped between two batches, with replies by generate()."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from orpo_dist.distributed.ranks import on_first_rank
from orpo_dist.packing.token_ids import inside
from orpo_dist.run.checkpoint import MARKER
from orpo_dist.training import refusals
from orpo_dist.training.evaluation import EvaluationPass, EvaluationStopped, with_prefix
from orpo_dist.training.overrides import check_evaluation_loader
from orpo_dist.training.saving import SavingTrainer
from orpo_dist.training.setup import tokenised
from orpo_dist.training.vocabulary import refuse_unknown_tokens, vocabulary_of


class EvaluatingTrainer(SavingTrainer):
    """The Trainer's evaluation with the metrics of whole sets (training/evaluation.py)."""

    _wrapped_by: str | None  # what has prepared the model for sharded training

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]
        if rows is None:
            raise refusals.no_evaluation_rows()
        return self.get_test_dataloader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        if not self.environment.sharding.partitions_weights:  # else the model is not yet wrapped as it will run
            self.layout.verify(self.model)
        rows = tokenised(test_dataset, "test", self.preparation, self._run_folder / "dropped_rows.jsonl")
        refuse_unknown_tokens(rows, "test", self.model.config, self.preparation.tokenizer)
        return self.loaders.evaluation(rows)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        watch = self.hang_watch.phase("evaluation", f"the evaluation of step {self.state.global_step}")
        with self._borrowed.in_use(), watch:
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._borrowed.in_use(), self.hang_watch.phase("evaluation", "predict()"):
            return super().predict(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's loop, with the metrics of the whole set (training/evaluation.py)."""
        if self._wrapped_by is None:
            refusals.refuse_to_evaluate_first(self.environment.sharding)
            self._wrapped_by = "evaluate() or predict()"
        check_evaluation_loader(dataloader)
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        keeps_pairs = not loss_only
        self._evaluation = evaluation = EvaluationPass(
            self._objective, keeps_pairs=keeps_pairs, speaks_for_pairs=self.environment.speaks_for_pairs
        )
        with self._throughput.paused():
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        metrics = evaluation.metrics(self.accelerator)
        predicted = evaluation.predictions()
        if self.compute_metrics is not None and predicted is not None:
            metrics |= self.compute_metrics(predicted)
        self._stop_requests.not_a_step()
        merged = {**(output.metrics or {}), **with_prefix(metrics, metric_key_prefix)}
        rows: Any = dataloader.dataset
        predictions, labels = (predicted.predictions, predicted.label_ids) if predicted is not None else (None, None)
        return EvalLoopOutput(predictions, labels, merged, len(rows))  # type: ignore[arg-type]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        assert self._evaluation is not None, "evaluation_loop calls this"
        if self._stop_requests.in_steps and self._ranks_want_to_stop():
            raise EvaluationStopped
        self.layout.verify(model, may_fall_back=False)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self._forward(model, inputs, self.args.device).scores
        self._evaluation.add(scores, inputs["orpo_layout"].index)
        self.hang_watch.progress()
        return None, None, None

    def _ranks_want_to_stop(self) -> bool:
        """Every rank has the same number of batches, so all of them leave an evaluation at the same one."""
        wants = torch.tensor(float(self._wants_to_stop()), device=self.args.device)
        return bool(self.accelerator.reduce(wants, reduction="sum") > 0)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)
        except EvaluationStopped:
            # The checkpoint of the step, in case it was to come after the evaluation; the resumed run does that first.
            self._step_guard.stops = True
            step = self.state.global_step
            folder = self._run_folder / f"checkpoint-{step}"
            self._finish_saving()
            if step and not on_first_rank(lambda: (folder / MARKER).is_file()):
                self._save_checkpoint(self.model_wrapped, trial)
                self._finish_saving()
            raise self._stopped(step, str(folder) if step else None) from None

    def _reply(self, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """generate() in the precision of training. Its caches would be compiled in vain (torch_compile)."""
        inputs = {name: tensor.to(self.args.device) for name, tensor in inputs.items()}
        if inside(options["pad_token_id"], vocabulary_of(self.model.config)) is None:
            options["pad_token_id"] = self._filler_id
            inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), self._filler_id)
        self.hang_watch.progress()
        was_training = self.model.training
        self.model.eval()
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eager, self.compute_loss_context_manager():
            # A rank that has sampled its last token takes part in the forwards of the others, which gather weights.
            shared = self.environment.sharding.partitions_weights and self.environment.world_size > 1
            output = self.model.generate(**inputs, **options, synced_gpus=shared)
        self.model.train(was_training)
        return output if self.preparation.options.is_encoder_decoder else output[:, inputs["input_ids"].shape[1] :]
