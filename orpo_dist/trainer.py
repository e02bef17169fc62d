"""ORPOTrainer: a transformers.Trainer whose gradients do not depend on how the global batch is split.

A run, from top to bottom:

    __init__               checks arguments, prepares pairs, adapts the model and sets its layout, creates the parts
    train                  finds the checkpoint to resume, then runs the Trainer's loop, which calls the methods below
    _training_begins       checks the layout, restores the sums of the checkpoint, guards the optimizer
    get_batch_samples      fetches the micro-batches of a step: one all-reduce of (tokens, pairs, stop, last loss)
    compute_loss           a micro-batch's share of the global loss, times the number of ranks
    _get_grad_norm         the one host read of a step: whether to apply it, and whether to stop after it
    _step_ends             requests the last checkpoint when the ranks have agreed to stop
    evaluation_loop        the metrics of a whole set, each pair with the same weight
    _save_checkpoint       writes to RUN/_saving, seals and renames

DDP, ZeRO and FSDP2 all average gradients over the ranks, but the shares of the loss must be summed: hence the factor in
compute_loss. The host reads nothing else between two log lines: metrics are one small vector on the device.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import TorchDynamoPlugin, gather_object
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, HubStrategy, IntervalStrategy

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Environment, Sharding, sharding_of
from orpo_dist.distributed.ranks import on_first_rank
from orpo_dist.distributed.timeouts import START_SECONDS, collectives_may_take
from orpo_dist.distributed.zero import safe_pickles
from orpo_dist.errors import RunStopped
from orpo_dist.loss import pair_sums
from orpo_dist.model.forward import PairForward
from orpo_dist.model.loading.adapter_files import adapter_folder, load_adapters
from orpo_dist.model.loading.init_kwargs import model_init_kwargs
from orpo_dist.model.loading.initial import initial_weights, resume_initial, save_initial, to_plain_lora
from orpo_dist.model.loading.load import load_model
from orpo_dist.model.loading.trained import record_trained
from orpo_dist.model.neftune import EmbeddingNoise
from orpo_dist.model.packed.compile import compile_blocks
from orpo_dist.model.patches import (
    BLOCKS_COMPILED_ALREADY,
    ONE_DEVICE_PER_PROCESS,
    Patched,
    replace_attribute,
    undo_all,
)
from orpo_dist.model.routers import router_aux_loss_coef
from orpo_dist.model.upstream import is_out_of_memory
from orpo_dist.options.durations import seconds_of
from orpo_dist.options.secrets import without_secrets
from orpo_dist.packing.lengths import PairLengths
from orpo_dist.packing.token_ids import inside
from orpo_dist.run.checkpoint import MARKER
from orpo_dist.run.fingerprint import fingerprint
from orpo_dist.run.owner import owned
from orpo_dist.run.stop import StopRequests, ignore_signals
from orpo_dist.run.upload import STAGED, unstage, upload_run
from orpo_dist.training import refusals
from orpo_dist.training.adapting import adapted_model
from orpo_dist.training.borrowed import BorrowedModel
from orpo_dist.training.checkpoint_writer import CheckpointWriter
from orpo_dist.training.evaluation import EvaluationPass, EvaluationStopped, with_prefix
from orpo_dist.training.final_model import save_checked, whole_weights
from orpo_dist.training.following import ArgsInForce
from orpo_dist.training.loaders import PairLoaders
from orpo_dist.training.malloc_trim import returning_freed_memory
from orpo_dist.training.metrics import MetricSums, StoredMetrics
from orpo_dist.training.nonfinite import PairFacts
from orpo_dist.training.optimizer_modes import use_averaged_weights
from orpo_dist.training.out_of_memory import out_of_memory
from orpo_dist.training.overrides import check_evaluation_loader, is_overridden, sampler_of
from orpo_dist.training.progress import progress_of, take_over
from orpo_dist.training.resuming import Resuming
from orpo_dist.training.setup import set_up, tokenised
from orpo_dist.training.step_guard import StepGuard
from orpo_dist.training.throughput import ModelFlops, Throughput
from orpo_dist.training.vocabulary import filler_token, refuse_unknown_tokens, vocabulary_of


class ORPOTrainer(Trainer):
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
    model: Any
    args: ORPOConfig
    eval_dataset: Any

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
        self._make_parts()
        self._add_callbacks()
        self._args_in_force = ArgsInForce(self.args, makes_models=model_init is not None)

    def _make_parts(self) -> None:
        """Create the parts of a run besides the model. Each has one job and receives what it needs."""
        args = self.args
        self._run_folder = run = Path(str(args.output_dir))
        self.environment = environment = Environment.of(args, sharding_of(self.accelerator))
        self._noise = EmbeddingNoise(args.neftune_noise_alpha or 0.0, args.seed)
        self._noise_hooks: list[Patched] = []
        self._train_sums, self._stored_metrics = MetricSums(), StoredMetrics()
        self._evaluation: EvaluationPass | None = None
        for name, rows in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            refuse_unknown_tokens(rows, name, self.model.config, self.preparation.tokenizer)
        self._filler_id = filler_token(self.model.config, self.preparation.tokenizer)
        self.loaders = PairLoaders(args, environment, self.layout, self._filler_id)
        facts = PairFacts(self.train_dataset, self._lengths, self.preparation.tokenizer)
        self._step_guard = StepGuard(run, args, environment, self.accelerator, facts)
        made_of = {
            "topology": environment.sharding.value,
            **fingerprint(args, self.model, self.train_dataset, self._lengths, self._global_batch),
        }
        self._checkpoints = CheckpointWriter(args, made_of, environment, self.accelerator)
        self._resuming = Resuming(run, args, made_of, environment, self.accelerator)

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

    def _follow_args(self) -> bool:
        """Take over options that have changed since construction or the last train(). Returns whether any has.

        Raises:
            UserError: one of them is fixed (training/following.py), or its value is refused.
        """
        args, before = self.args, self._args_in_force.taken
        if not self._args_in_force.changed(args):
            return False
        self._args_in_force.take(args)
        self._setup = self._setup.follow(args, self.environment.sharding)
        self._objective = self._setup.objective
        self._forward = PairForward(self.layout, self._objective)
        batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
        if any(before[name] != getattr(args, name) for name in batch):
            self._train_batch_size = args.train_batch_size
            self._global_batch = self.environment.global_batch(args)
        limit = seconds_of(args.max_runtime) if args.max_runtime is not None else None
        self._stop_requests.follow(Path(str(args.output_dir)), limit)
        return True

    def _hp_search_setup(self, trial: Any) -> None:
        if trial is None or self.model_init is None:
            super()._hp_search_setup(trial)
        else:  # call_model_init has set its options
            self._make_parts()
            self._resuming.resolve(self._asked_checkpoint)

    # ------------------------------------------------------------------ model and data

    def call_model_init(self, trial: Any = None) -> nn.Module:
        if trial is not None:  # a trial's options come before the model, which is made with them
            super()._hp_search_setup(trial)
            self._follow_args()
        return self._adapted(super().call_model_init(trial), self.args)

    def _adapted(self, model: nn.Module, args: ORPOConfig) -> nn.Module:
        borrowed = self._borrowed
        borrowed.another()
        given = isinstance(model, PeftModel)
        adapted = model = adapted_model(model, args, self._peft_config, borrowed)
        self._initial_adapters = initial_weights(model, given=given)
        self._choose_layout(model, args)
        if args.torch_compile:
            compiler = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            borrowed.change(lambda: compile_blocks(adapted, **compiler))
        borrowed.change(self.layout.fix_rotary)
        borrowed.change(self.layout.widen_pixels)
        return model

    def _choose_layout(self, model: Any, args: ORPOConfig) -> None:
        self.layout.choose(model, router_aux_loss_coef=router_aux_loss_coef(model, args.router_aux_loss_coef))
        self._throughput = Throughput(ModelFlops.of(model), args.nll_scope)  # model_init may return another size

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.layout.autocast = self.accelerator.autocast
        replace_attribute(
            self.accelerator.state, "dynamo_plugin", TorchDynamoPlugin(backend="no"), BLOCKS_COMPILED_ALREADY
        )

    def get_train_dataloader(self) -> DataLoader:
        return self.loaders.training(
            self.train_dataset,
            self._lengths,
            global_batch=self._global_batch,
            micro_batch=self._train_batch_size,
            order=sampler_of(self),
        )

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
        pickles = safe_pickles() if self.environment.sharding.is_zero else nullcontext()
        with owned(self._run_folder):
            if trial is None:
                resume_from_checkpoint = self._resuming.resolve(resume_from_checkpoint)
            try:
                with self._stop_requests.listening(), pickles, self._borrowed.in_use():
                    return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._step_guard.release()
                undo_all(self._noise_hooks)

    def _begin_anew(self) -> None:
        """Before a train() outside of a search: options may have changed, and a search leaves no model behind."""
        if self.model is None:
            self.model = self.model_wrapped = self.call_model_init()
        if self._follow_args():
            if self.model_init is None:
                self._choose_layout(self.model, self.args)
            self._make_parts()

    def _inner_training_loop(  # type: ignore[override]  # the Trainer calls it by these names
        self, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        with returning_freed_memory(self.args.device):
            result = super()._inner_training_loop(batch_size, **kwargs)
        use_averaged_weights(self.optimizer)
        return result

    def _load_best_model(self) -> None:
        use_averaged_weights(self.optimizer)  # else a later switch would average the last step's into the best ones
        if self._loads_adapters():
            load_adapters(self.model, Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_adapters():
            load_adapters(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _loads_adapters(self) -> bool:
        """Whether a checkpoint holds adapters as peft saves them, and not the form of ZeRO or FSDP."""
        sharding = self.environment.sharding
        return isinstance(self.model, PeftModel) and not sharding.is_zero and sharding is not Sharding.FSDP

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed after the last step: the Trainer would do one more before it looks at max_steps
            self.control.should_training_stop = True

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Accumulate over more, smaller micro-batches, so that the global batch does not change."""
        super()._update_auto_batch_size(batch_size)
        micro_batches = -(-self._global_batch // (batch_size * self.environment.data_ranks))
        self.args.gradient_accumulation_steps = micro_batches
        self._args_in_force.take(self.args)  # the global batch is still the one that was asked for

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
        collectives_may_take(max(self.args.ddp_timeout, START_SECONDS))
        self._first_step = self.state.global_step + 1
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
        counts = torch.stack([layout.counts() for layout in layouts]).sum(0)
        report = self._step_guard.report(self._stop_requests.reason() is not None, device)
        facts = self.accelerator.reduce(torch.cat([counts.to(device, report.dtype), report]), reduction="sum")
        tokens, pairs = facts[:2].unbind()
        self._step_guard.begin(facts[2:], [i for layout in layouts for i in layout.index if i >= 0])
        for layout in layouts:
            layout.tokens, layout.pairs = tokens, pairs
            self._throughput.add(self._lengths_of(layout))
        return batches, tokens

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
        if self.state.global_step == self._first_step:
            collectives_may_take(self.args.ddp_timeout)
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
        """Model FLOPs of a micro-batch (model/flops.py)."""
        return int(self._throughput.flops_of(self._lengths_of(inputs["orpo_layout"])))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """A packed row has no padding, although its pad token may be a real one (EOS)."""
        if "attention_mask" not in inputs:
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)

    def _lengths_of(self, layout: Any) -> list[PairLengths]:
        return [self._lengths[index] for index in layout.index if index >= 0]  # neither fillers nor unnumbered rows

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._borrowed.in_use():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._borrowed.in_use():
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
        self._evaluation = evaluation = EvaluationPass(self._objective, keeps_pairs=keeps_pairs)
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
        return None, None, None

    def _ranks_want_to_stop(self) -> bool:
        """Every rank has the same number of batches, so all of them leave an evaluation at the same one."""
        wants = torch.tensor(float(self._stop_requests.reason() is not None), device=self.args.device)
        return bool(self.accelerator.reduce(wants, reduction="sum") > 0)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)
        except EvaluationStopped:
            # The checkpoint of the step, in case it was to come after the evaluation; the resumed run does that first.
            self._step_guard.stops = True
            step = self.state.global_step
            folder = self._run_folder / f"checkpoint-{step}"
            if step and not on_first_rank(lambda: (folder / MARKER).is_file()):
                self._save_checkpoint(self.model_wrapped, trial)
            raise self._stopped(step, str(folder) if step else None) from None

    def _reply(self, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """generate() in the precision of training. Its caches would be compiled in vain (torch_compile)."""
        inputs = {name: tensor.to(self.args.device) for name, tensor in inputs.items()}
        if inside(options["pad_token_id"], vocabulary_of(self.model.config)) is None:
            options["pad_token_id"] = self._filler_id
            inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), self._filler_id)
        was_training = self.model.training
        self.model.eval()
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eager, self.compute_loss_context_manager():
            # A rank that has sampled its last token takes part in the forwards of the others, which gather weights.
            shared = self.environment.sharding.partitions_weights and self.environment.world_size > 1
            output = self.model.generate(**inputs, **options, synced_gpus=shared)
        self.model.train(was_training)
        return output if self.preparation.options.is_encoder_decoder else output[:, inputs["input_ids"].shape[1] :]

    # ------------------------------------------------------------------ model and checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, or its adapter, with tokenizer and config, whatever form the checkpoints have.

        Raises:
            SaveError: on the rank that writes: transformers or peft could not load what lies there.
        """
        if self._checkpoints.staging is not None:  # part of a checkpoint, which keeps the form that was asked for
            super().save_model(output_dir, _internal_call=True)
            return
        use_averaged_weights(self.optimizer)
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        save_checked(
            partial(self._save_whole, folder),
            self.accelerator.unwrap_model(self.model),
            folder,
            checks=self.args.should_save,
            trust_remote_code=self.args.trust_remote_code,
        )
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_whole(self, folder: Path) -> None:
        half = self.args.bf16 or self.args.fp16
        changed = bool(self._initial_adapters)
        trained = record_trained(self.model, self.args.device, base_changed=changed, half=half)
        with whole_weights(self.accelerator, self.environment.sharding, self.deepspeed):
            super().save_model(str(folder), _internal_call=True)  # which only means: without a push
        if self.args.should_save:
            for name, initial in self._initial_adapters.items():
                to_plain_lora(adapter_folder(folder, name), initial)
            if trained is not None:
                trained.save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        began, write = time.monotonic(), super()._save_checkpoint
        use_averaged_weights(self.optimizer)
        progress = progress_of(self, self._train_sums, self._step_guard)

        def write_all() -> None:
            write(model, trial)
            if self.args.should_save:
                save_initial(
                    self._initial_adapters, Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
                )

        with self._throughput.paused():
            run = Path(super()._get_output_dir(trial))
            published = self._checkpoints.save(run, self.state, write_all, progress)
            if self.args.push_to_hub:
                super()._push_from_checkpoint(str(published))
        self._stop_requests.saved(time.monotonic() - began)

    def _get_output_dir(self, trial: Any) -> str:
        staging = self._checkpoints.staging
        return str(staging) if staging is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._checkpoints.staging is not None:  # it does not have its final name yet
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        # The Trainer copies the model's files into output_dir and uploads all of it: a folder with nothing else in it.
        run = self.args.output_dir
        self.args.output_dir = str(Path(str(run)) / f"{STAGED}-{self.state.global_step}")
        try:
            Path(self.args.output_dir).mkdir(exist_ok=True)
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self.args.output_dir = run

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self.is_world_process_zero():
            unstage(self._run_folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the Trainer's, for the files that run/upload.py lists. Every rank must call it."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, **({"private": private} if private is not None else {}))
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [*([tags] if isinstance(tags, str) else tags), *(self.model.model_tags or [])]
        self.create_model_card(tags=tags, **kwargs)
        self._finish_current_push()
        return upload_run(
            Path(str(self.args.output_dir)),
            str(self.hub_model_id),
            blocking=blocking,
            commit_message=commit_message,
            token=token,
            revision=revision if revision is not None else self.args.hub_revision,
        )

    def _checkpoint_saved(self) -> None:
        """Raises RunStopped if the ranks have agreed to stop."""
        step = self.state.global_step
        if self._step_guard.stops and step < self.state.max_steps:
            raise self._stopped(step, str(self._run_folder / f"checkpoint-{step}"))

    def _stopped(self, step: int, checkpoint: str | None) -> RunStopped:
        """A collective: the reason is that of any rank."""
        ignore_signals()
        reasons = [reason for reason in gather_object([self._stop_requests.reason()]) if reason is not None]
        return RunStopped(reasons[0] if reasons else "asked to", step, checkpoint)

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output folder. The arguments are those of TRL, passed by `push_to_hub`."""
        if self.is_world_process_zero():
            from orpo_dist.run.model_card import CardFacts, write_model_card

            write_model_card(CardFacts.of(self.model, self.args, model_name, dataset_name, tags), self.args, self.state)


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
