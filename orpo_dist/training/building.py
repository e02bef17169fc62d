"""The model and the parts of a run: made at construction, and again when options change or a search begins a trial.

The first of ORPOTrainer's bases (training/saving.py, training/evaluating.py, orpo_dist/trainer.py).
"""

from pathlib import Path
from typing import Any

from accelerate.utils import TorchDynamoPlugin
from peft import PeftModel
from torch import nn
from transformers import Trainer

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Environment, sharding_of, why_not_sharded
from orpo_dist.distributed.hang import HangLimits, HangWatch
from orpo_dist.distributed.log import get_logger
from orpo_dist.loss import Objective
from orpo_dist.model.forward import PairForward
from orpo_dist.model.loading.initial import initial_weights
from orpo_dist.model.neftune import EmbeddingNoise
from orpo_dist.model.packed.choose_layout import LayoutChoice
from orpo_dist.model.packed.compile import compile_blocks
from orpo_dist.model.patches import BLOCKS_COMPILED_ALREADY, Patched, replace_attribute
from orpo_dist.model.routers import router_aux_loss_coef
from orpo_dist.model.running_statistics import keep_running_statistics
from orpo_dist.options.durations import seconds_of
from orpo_dist.packing.lengths import PairLengths
from orpo_dist.run.fingerprint import fingerprint
from orpo_dist.run.prepare import Preparation
from orpo_dist.run.stop import StopRequests
from orpo_dist.training.adapting import adapted_model
from orpo_dist.training.borrowed import BorrowedModel
from orpo_dist.training.checkpoint_writer import CheckpointWriter
from orpo_dist.training.evaluation import EvaluationPass
from orpo_dist.training.following import ArgsInForce
from orpo_dist.training.loaders import PairLoaders
from orpo_dist.training.metrics import MetricSums, StoredMetrics
from orpo_dist.training.nonfinite import PairFacts
from orpo_dist.training.resuming import Resuming
from orpo_dist.training.setup import Setup
from orpo_dist.training.step_guard import StepGuard
from orpo_dist.training.throughput import ModelFlops, Throughput
from orpo_dist.training.vocabulary import filler_token, refuse_unknown_tokens

logger = get_logger(__name__)


def hang_limits(args: ORPOConfig) -> HangLimits:
    return HangLimits(args.ddp_timeout, args.save_timeout, args.eval_timeout, args.last_act_timeout)


class BuildingTrainer(Trainer):
    """A Trainer of named parts, each of which has one job and receives what it needs."""

    model: Any
    args: ORPOConfig
    eval_dataset: Any
    layout: LayoutChoice
    preparation: Preparation
    _setup: Setup
    _objective: Objective
    _forward: PairForward
    _borrowed: BorrowedModel
    _lengths: list[PairLengths]
    _peft_config: Any
    _global_batch: int
    _stop_requests: StopRequests
    hang_watch: HangWatch
    _args_in_force: ArgsInForce
    _asked_checkpoint: str | bool | None

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
        self._checkpoints = CheckpointWriter(args, made_of, environment)
        self._resuming = Resuming(run, args, made_of, environment, self.accelerator)

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
        self.hang_watch.follow(hang_limits(args))
        return True

    def _hp_search_setup(self, trial: Any) -> None:
        if trial is None or self.model_init is None:
            super()._hp_search_setup(trial)
        else:  # call_model_init has set its options
            self._make_parts()
            self._resuming.resolve(self._asked_checkpoint)

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
        borrowed.change(self.layout.type_text_tokens)
        borrowed.change(lambda: keep_running_statistics(adapted))
        return model

    def _choose_layout(self, model: Any, args: ORPOConfig) -> None:
        self.layout.choose(model, router_aux_loss_coef=router_aux_loss_coef(model, args.router_aux_loss_coef))
        self._throughput = Throughput(ModelFlops.of(model), args.nll_scope)  # model_init may return another size

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        not_sharded = why_not_sharded(self.args, self.accelerator)
        if not_sharded is not None:
            logger.warning(not_sharded)
        self.layout.autocast = self.accelerator.autocast
        replace_attribute(
            self.accelerator.state, "dynamo_plugin", TorchDynamoPlugin(backend="no"), BLOCKS_COMPILED_ALREADY
        )

    def _begin_anew(self) -> None:
        """Before a train() outside of a search: options may have changed, and a search leaves no model behind."""
        if self.model is None:
            self.model = self.model_wrapped = self.call_model_init()
        if self._follow_args():
            if self.model_init is None:
                self._choose_layout(self.model, self.args)
            self._make_parts()

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Accumulate over more, smaller micro-batches, so that the global batch does not change."""
        super()._update_auto_batch_size(batch_size)
        micro_batches = -(-self._global_batch // (batch_size * self.environment.data_ranks))
        self.args.gradient_accumulation_steps = micro_batches
        self._args_in_force.take(self.args)  # the global batch is still the one that was asked for
