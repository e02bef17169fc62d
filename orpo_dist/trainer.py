"""ORPOTrainer: a transformers.Trainer whose gradients do not depend on how the global batch is split.

A run, from top to bottom:

    __init__               checks arguments, prepares pairs, adapts the model and sets its layout, creates the parts
    train                  finds the checkpoint to resume, then runs the Trainer's loop, which calls the methods below
    _training_begins       checks the layout, restores the sums of the checkpoint, guards the optimizer
    get_batch_samples      fetches the micro-batches of a step: one all-reduce of (tokens, pairs, stop, last loss)
    compute_loss           a micro-batch's share of the global loss, times the number of ranks
    _get_grad_norm         the one host read of a step: whether to apply it, and whether to stop after it
    _step_ends             requests the last checkpoint when the ranks have agreed to stop
    evaluation_loop        the metrics of a whole set, each pair with the same weight (training/evaluating.py)
    _save_checkpoint       writes to RUN/_saving, seals and renames (training/saving.py)

What makes the parts is in training/building.py. The four classes are one trainer, in the order
BuildingTrainer, SavingTrainer, EvaluatingTrainer, ORPOTrainer.

DDP, ZeRO and FSDP2 all average gradients over the ranks, but the shares of the loss must be summed: hence the factor in
compute_loss. The host reads nothing else between two log lines: metrics are one small vector on the device.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction, IntervalStrategy

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Environment, sharding_of
from orpo_dist.distributed.hang import HangWatch
from orpo_dist.distributed.zero import safe_pickles
from orpo_dist.loss import pair_sums
from orpo_dist.model.forward import PairForward
from orpo_dist.model.loading.init_kwargs import model_init_kwargs
from orpo_dist.model.loading.initial import resume_initial
from orpo_dist.model.loading.load import load_model
from orpo_dist.model.patches import (
    ONE_DEVICE_PER_PROCESS,
    replace_attribute,
    undo_all,
)
from orpo_dist.model.upstream import is_out_of_memory
from orpo_dist.options.durations import seconds_of
from orpo_dist.options.secrets import without_secrets
from orpo_dist.packing.lengths import PairLengths
from orpo_dist.run.owner import owned
from orpo_dist.run.stop import StopRequests
from orpo_dist.training import refusals
from orpo_dist.training.borrowed import BorrowedModel
from orpo_dist.training.building import hang_limits
from orpo_dist.training.evaluating import EvaluatingTrainer
from orpo_dist.training.following import ArgsInForce
from orpo_dist.training.malloc_trim import returning_freed_memory
from orpo_dist.training.optimizer_modes import use_averaged_weights
from orpo_dist.training.out_of_memory import out_of_memory
from orpo_dist.training.overrides import check_evaluation_loader, is_overridden, sampler_of
from orpo_dist.training.progress import take_over
from orpo_dist.training.setup import set_up


class ORPOTrainer(EvaluatingTrainer):
    """Trainer for odds-ratio preference optimisation; a drop-in for `trl.experimental.orpo.ORPOTrainer`.

    Args:
        model: a model, or the name or path of one (loaded after the data audit).
        args: an `ORPOConfig`. The trainer works on a copy, `trainer.args`.
        data_collator: a collator written for TRL's trainer; default: the built-in one.
        train_dataset, eval_dataset: rows of preference pairs in any format of docs/data.md, or tokenised rows
            (`prompt_ids`, `chosen_ids`, `rejected_ids`). `eval_dataset` may be a dict or a DatasetDict.
        processing_class: the tokenizer, or the processor of a vision-language model; default: loaded with the model.
        model_init: a function that returns the model, instead of `model`.
        compute_metrics: receives an `EvalPrediction` whose predictions are two (n,) arrays, the mean log-probabilities
            of the chosen and of the rejected completions, in the order of the evaluation set.
        preprocess_logits_for_metrics: not supported, since logits are never gathered.
        peft_config: adapter to add.

    Raises:
        UserError: contradicting options, data that cannot be trained on, or a model that cannot be loaded.
    """

    _tag_names: ClassVar = ["orpo", "orpo_dist"]
    # As in TRL: training_step divides what compute_loss returns by the accumulation steps, so that a term that a
    # subclass adds to it counts once per optimizer step.
    loss_is_scaled_for_ga: bool = False

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: ORPOConfig | None = None,
        data_collator: Callable[[list[dict]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
    ):
        args = ORPOConfig("trainer_output") if args is None else args
        refusals.refuse_prompt_learning(peft_config, model, args.gradient_checkpointing)
        setup = set_up(
            args,
            model=model,
            model_init=model_init,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            optimizer=optimizers[0],
            compute_metrics=compute_metrics,
            trainer_class=type(self),
        )
        args, self.preparation, self.layout, self._setup = setup.args, setup.preparation, setup.layout, setup
        self._lengths, self._objective, self._peft_config = setup.lengths, setup.objective, peft_config
        self._forward = PairForward(self.layout, self._objective)
        self._borrowed = BorrowedModel()
        self._wrapped_by: str | None = None  # what has prepared the model for sharded training
        set_seed(args.seed)  # a new adapter is initialised at random
        if isinstance(model, str):
            model = load_model(model, **{"trust_remote_code": args.trust_remote_code, **model_init_kwargs(args)})
        if model is not None:
            model = self._adapted(model, args)

        super().__init__(
            model=model,
            args=args,
            data_collator=self.layout.collator,
            train_dataset=setup.train_rows,
            eval_dataset=setup.eval_rows,
            processing_class=self.preparation.processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if isinstance(self.args.model_init_kwargs, dict):  # used up; trackers write the arguments down
            self.args.model_init_kwargs = without_secrets(self.args.model_init_kwargs)
        # transformers before 5.23 asks this flag alone whether training_step divides by the accumulation steps.
        self.neftune_noise_alpha = None  # the Trainer's hook takes a packed row for one sequence: model/neftune.py
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga
        self.current_gradient_accumulation_steps = 1  # until the Trainer's loop counts them
        replace_attribute(self.args, "_n_gpu", min(self.args.n_gpu, 1), ONE_DEVICE_PER_PROCESS)
        self.model.add_model_tags(self._tag_names)
        self._global_batch = Environment.of(self.args, sharding_of(self.accelerator)).global_batch(self.args)
        limit = seconds_of(args.max_runtime) if args.max_runtime is not None else None
        self._stop_requests = StopRequests(Path(str(args.output_dir)), limit, is_first_rank=args.process_index == 0)
        self.hang_watch = HangWatch(hang_limits(self.args))
        self._make_parts()
        self._add_callbacks()
        self._args_in_force = ArgsInForce(self.args, makes_models=model_init is not None)

    def _add_callbacks(self) -> None:
        args = self.args
        self.add_callback(_Hooks(self))
        if args.generate_during_eval:
            from orpo_dist.training.samples import SampleReplies

            rows = self.eval_dataset
            rows = next(iter(rows.values()), None) if isinstance(rows, dict) else rows
            self.add_callback(
                SampleReplies(rows, self.preparation.processing_class, self._reply, self.callback_handler, args.seed)
            )

    def get_train_dataloader(self) -> DataLoader:
        return self.loaders.training(
            self.train_dataset,
            self._lengths,
            global_batch=self._global_batch,
            micro_batch=self._train_batch_size,
            order=sampler_of(self),
        )

    # ------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint: a path, `auto` or True.

        Raises:
            RunStopped: a stop was requested; a checkpoint was saved.
            NonFiniteRun: too many consecutive steps could not be applied.
            SaveError: a checkpoint could not be written.
            UserError: there is no such checkpoint, it belongs to another run, or another run trains in the folder.
        """
        if self.model_init is None:
            refusals.refuse_to_wrap_again(self.environment.sharding, self._wrapped_by)
        self._wrapped_by = "train()"
        trial = kwargs.get("trial", args[0] if args else None)
        self._asked_checkpoint = resume_from_checkpoint
        if trial is None:
            self._begin_anew()
        self.hang_watch.begin()
        self.hang_watch.now("start", "the start of training")
        pickles = safe_pickles() if self.environment.sharding.is_zero else nullcontext()
        with owned(self._run_folder):
            if trial is None:
                resume_from_checkpoint = self._resuming.resolve(resume_from_checkpoint)
            try:
                with self._stop_requests.listening(), pickles, self._borrowed.in_use():
                    return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._checkpoints.settle()
                self._step_guard.release()
                undo_all(self._noise_hooks)
                self.hang_watch.leave()

    def _inner_training_loop(  # type: ignore[override]  # the Trainer calls it by these names
        self, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        with returning_freed_memory(self.args.device):
            result = super()._inner_training_loop(batch_size, **kwargs)
        use_averaged_weights(self.optimizer)
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed after the last step: the Trainer would do one more before it looks at max_steps
            self.control.should_training_stop = True

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if optimizer is None:
            self._resuming.optimizer_made(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        load = super()._load_rng_state
        if checkpoint is not None:
            self._resuming.restore_rng(self.state.global_step, lambda: load(checkpoint))

    def _training_begins(self) -> None:
        """Called after the model is wrapped and the checkpoint loaded, before the first step."""
        self.layout.verify(self.model_wrapped)
        self._step_guard.training_begins(self.accelerator)
        undo_all(self._noise_hooks)  # of an earlier loop of this train() (auto_find_batch_size)
        if self.args.neftune_noise_alpha is not None:
            self._noise_hooks.append(self._noise.attach(self.model))
        take_over(self._resuming.loaded(self.optimizer), self, self._train_sums, self._step_guard, self.environment)
        if self._resuming.checkpoint is not None:
            sharded, folder = self.environment.sharding.partitions_weights, self._resuming.checkpoint
            self._initial_adapters = resume_initial(self.model, self._initial_adapters, folder, sharded=sharded)
        if self.args.eval_strategy != IntervalStrategy.NO and is_overridden(type(self), "get_eval_dataloader"):
            some = next(iter(self.eval_dataset)) if isinstance(self.eval_dataset, dict) else None
            check_evaluation_loader(self.get_eval_dataloader(some))  # now, and not after the steps before an evaluation
        steps_left = self.state.global_step < self.state.max_steps
        if self._resuming.evaluation_is_due(self.state, self.eval_dataset is not None) or (
            not steps_left and self.control.should_evaluate
        ):
            self._evaluate(None, None)
        if not steps_left:
            return
        self._step_guard.guard(self.optimizer)
        self.hang_watch.now("start", f"step {self.state.global_step + 1}")
        self._stop_requests.steps_begin()

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """Fetches all micro-batches of one optimizer step and computes the totals of the global batch.

        One all-reduce per step, which also agrees on stopping. The totals are stored in the layouts, where they are not
        cast to bf16."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        layouts = [batch["orpo_layout"] for batch in batches]
        speaks = self.environment.speaks_for_pairs
        counts = torch.stack([layout.counts() for layout in layouts]).sum(0) * float(speaks)
        report = self._step_guard.report(self._wants_to_stop(), device)
        facts = self.accelerator.reduce(torch.cat([counts.to(device, report.dtype), report]), reduction="sum")
        tokens, pairs = facts[:2].unbind()
        indices = [i for layout in layouts for i in layout.index if i >= 0]
        self._step_guard.begin(facts[2:], indices if speaks else [])
        for layout in layouts:
            layout.tokens, layout.pairs = tokens, pairs
            if speaks:
                self._throughput.add(self._lengths_of(layout))
        return batches, tokens

    def get_total_train_batch_size(self, args: Any) -> int:
        """Pairs of one optimizer step: ranks that share a row do not count twice."""
        return super().get_total_train_batch_size(args) // self.environment.sequence_size

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        micro_batch = [index for index in inputs["orpo_layout"].index if index >= 0]
        try:
            with self.layout.in_force(), self._noise.of(inputs, self.state.global_step):
                return super().training_step(model, inputs, num_items_in_batch)
        except (RuntimeError, MemoryError) as error:
            if self.args.auto_find_batch_size or not is_out_of_memory(error):
                raise
            raise out_of_memory(error, self.state.global_step + 1, micro_batch, self._lengths, self.args) from error

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = self._forward(model, inputs, self.args.device)
        self._train_sums.add(pair_sums(result.scores, self._objective))
        assert result.loss is not None, "get_batch_samples has written the totals"
        loss = self._step_guard.count(result.loss) * self.environment.world_size  # gradients are averaged over ranks
        if not self.loss_is_scaled_for_ga:
            loss = loss * self.current_gradient_accumulation_steps  # which training_step divides by
        return (loss, result.scores) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._step_guard.judge(norm, self.state.global_step + 1)

    def _step_ends(self, control: TrainerControl) -> None:
        self._stop_requests.step_ends()
        self.hang_watch.now("step", f"step {self.state.global_step + 1}")
        if self._step_guard.stops and self.state.global_step < self.state.max_steps:
            control.should_save, control.should_evaluate = True, False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training event: add the metrics; the Trainer's loss is already exact
            metrics = self._train_sums.drain(self.accelerator, self._objective)
            logs |= {name: value for name, value in metrics.items() if name != "loss"}
            logs |= self._throughput.drain(self.accelerator)
            if self.is_in_train:
                # The Trainer empties its sum by subtracting it from itself, which leaves NaN after a refused step.
                self._tr_loss.nan_to_num_(0.0)
        if "train_loss" in logs:  # the Trainer divides the sum of the whole run by the steps of this call only
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs | self._stored_metrics.drain("train" if "loss" in logs else "eval"), start_time)

    def store_metrics(self, metrics: dict[str, Any], train_eval: Literal["train", "eval"] = "train") -> None:
        """Adds the means of these metrics to the next training or evaluation line of the log, as in TRL."""
        self._stored_metrics.add(metrics, train_eval)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Model FLOPs of a micro-batch (model/flops.py), which the Trainer adds up over the ranks."""
        if not self.environment.speaks_for_pairs:
            return 0
        return int(self._throughput.flops_of(self._lengths_of(inputs["orpo_layout"])))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """A packed row has no padding, although its pad token may be a real one (EOS)."""
        if not self.environment.speaks_for_pairs:
            inputs = {**inputs, "input_ids": inputs["input_ids"][:, :0]}
        if "attention_mask" not in inputs:
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)

    def _lengths_of(self, layout: Any) -> list[PairLengths]:
        return [self._lengths[index] for index in layout.index if index >= 0]  # neither fillers nor unnumbered rows

    # ------------------------------------------------------------------ evaluation

    # ------------------------------------------------------------------ model and checkpoints


class _Hooks(TrainerCallback):
    """Calls the trainer at points of the loop for which Trainer has no method to override."""

    def __init__(self, trainer: ORPOTrainer):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._training_begins()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._step_ends(control)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._checkpoint_saved()
