"""ORPOTrainer: a transformers.Trainer whose gradients do not depend on how the global batch is cut.

    rows -> prepare_pairs -> GlobalBatchSampler (one bin of pairs per rank and micro-step) -> collator (+ layout)
         -> get_batch_samples: one all-reduce of (tokens, pairs, stop, last loss) per optimizer step
         -> compute_loss: this micro-batch's share of the global loss, times the data-parallel size

DDP, ZeRO and FSDP2 all average gradients over the ranks while the shares of the loss add up: hence the last factor.
Between two log lines nothing is read on the host: metrics are one small vector on the device.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import TorchDynamoPlugin
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalPrediction

from orpo_dist.config import ORPOConfig
from orpo_dist.errors import UserError
from orpo_dist.loss import Objective, pair_sums
from orpo_dist.model.flops import ModelFlops
from orpo_dist.model.forward import ForwardOptions, ImageSetup, PairForward
from orpo_dist.model.loading.adapters import add_adapter, disable_base_dropout
from orpo_dist.model.loading.load import load_model
from orpo_dist.model.loading.processor import (
    is_encoder_decoder,
    model_init_kwargs,
    processing_class_of,
    resolve_max_length,
    tokenizer_of,
)
from orpo_dist.model.loading.vision import freeze, frozen_parts, name_present_layers, without_parts
from orpo_dist.model.packed.compile import compile_blocks
from orpo_dist.options.model import compute_dtype
from orpo_dist.packing.images import shortest_with_images
from orpo_dist.packing.lengths import pair_lengths, sharing_gain
from orpo_dist.packing.sampler import FILLER, GlobalBatchSampler
from orpo_dist.training import refusals
from orpo_dist.training.evaluation import PairEvaluation
from orpo_dist.training.malloc_trim import returning_freed_memory
from orpo_dist.training.metrics import MetricSums
from orpo_dist.training.resumable import ResumableTrainer
from orpo_dist.training.throughput import Throughput

LEAST_SHARING_GAIN = 1.05
logger = get_logger(__name__)

if TYPE_CHECKING:
    from orpo_dist.data.prepare import PreparedPairs


class ORPOTrainer(PairEvaluation, ResumableTrainer):
    """Trainer for odds-ratio preference optimisation; a drop-in for `trl.experimental.orpo.ORPOTrainer`.

    Args:
        model: a model, or the name or path of one (loaded after the data was audited).
        args: an `ORPOConfig`.
        data_collator: a collator written for TRL's trainer; unset, the built-in one.
        train_dataset, eval_dataset: rows of preference pairs in any format of docs/data.md, or rows that are tokenised
            already (`prompt_ids`, `chosen_ids`, `rejected_ids`). `eval_dataset` may be a dict or a DatasetDict.
        processing_class: the tokenizer, or the processor of a vision-language model; unset, the one of the model.
        model_init: a function that returns the model, instead of `model`.
        compute_metrics: receives an `EvalPrediction` whose predictions are two (n,) arrays, the mean log-probabilities
            of the chosen and of the rejected completions, in the order of the evaluation set.
        preprocess_logits_for_metrics: refused: logits are never gathered.
        peft_config: adapter to add.

    Raises:
        UserError: options that contradict each other, data that cannot be trained on, a model that cannot be loaded.
    """

    _tag_names: ClassVar = ["orpo", "orpo_dist"]
    model: Any
    args: ORPOConfig
    eval_dataset: Any
    objective: Objective

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
        refusals.refuse_what_needs_logits(args, preprocess_logits_for_metrics)
        refusals.refuse_unsupported_parallelism(args)
        refusals.refuse_missing_kernels(args, zero3=is_deepspeed_zero3_enabled())
        has_rows = train_dataset is not None or eval_dataset is not None
        refusals.refuse_contradictions(args, model, model_init, has_rows)

        self.objective = Objective(beta=args.beta, label_smoothing=args.label_smoothing)
        self._peft_config = peft_config
        self.is_encoder_decoder = is_encoder_decoder(model, args)
        self._processing_class = processing_class_of(model, args, processing_class)
        self._tokenizer = tokenizer_of(self._processing_class)
        resolve_max_length(args, self._processing_class)
        self._prepare_options = args.prepare_options(self.is_encoder_decoder)
        self.prepared: dict[str, PreparedPairs] = {}
        self._run_folder = Path(str(args.output_dir))
        if train_dataset is not None:
            train_dataset = self._tokenised(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._tokenised(rows, f"eval_{name}") for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._tokenised(eval_dataset, "eval")
        self._lengths = pair_lengths(train_dataset) if train_dataset is not None else []
        self._image_setup = self._images_of(args, train_dataset, eval_dataset)
        self.forward = PairForward(self._forward_options(args, data_collator))

        set_seed(args.seed)  # a new adapter is initialised at random
        if isinstance(model, str):
            model = load_model(model, trust_remote_code=args.trust_remote_code, **model_init_kwargs(args))
        if model is not None:
            model = self._adapt(model, args)
        self._train_sums, self._eval_sums = MetricSums(), MetricSums()
        self._eval_rows: list[tuple[int, float, float]] | None = None

        super().__init__(
            model=model,
            args=args,
            data_collator=self.forward,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self._processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # With this and the token count of get_batch_samples, training_step knows that compute_loss has divided by the
        # totals of the global batch and does not divide by the accumulation steps (transformers 5.17 has no other way).
        self.model_accepts_loss_kwargs = True
        self.args._n_gpu = min(self.args.n_gpu, 1)  # DataParallel would tear pairs apart; accelerate launch shares them
        self._global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.model.add_model_tags(self._tag_names)
        self._prepare_to_survive()
        self.add_callback(_VerifyLayout(self))
        if args.generate_during_eval:
            from orpo_dist.training.samples import SampleReplies

            self.add_callback(SampleReplies(self))

    # ------------------------------------------------------------------ model and data

    def _forward_options(self, args: ORPOConfig, foreign: Callable | None) -> ForwardOptions:
        longest = max((pair.prompt + max(pair.chosen, pair.rejected) for pair in self._lengths), default=None)
        pad_token_id = args.padding_value if args.padding_value is not None else self._tokenizer.pad_token_id
        return ForwardOptions(
            objective=self.objective,
            padding_free=args.padding_free,
            prefix_sharing=args.prefix_sharing and self._sharing_pays(args),
            verify_layout=args.verify_layout,
            loss_chunk_size=args.loss_chunk_size,
            nll_scope=args.nll_scope,
            pad_token_id=pad_token_id,
            max_length=args.max_length or longest,
            compute_dtype=compute_dtype(args.bf16, args.fp16),
            foreign=foreign,
            images=self._image_setup,
        )

    def _images_of(self, args: ORPOConfig, train_rows: Any, eval_rows: Any) -> ImageSetup | None:
        """How images enter the forward; None where no row has one."""
        sets = [train_rows, *(eval_rows.values() if isinstance(eval_rows, dict) else [eval_rows])]
        example = next((row for rows in sets if (row := shortest_with_images(rows)) is not None), None)
        if example is None:
            return None
        if not isinstance(self._processing_class, ProcessorMixin):
            raise UserError(
                "The rows have images, and the processing class is a tokenizer: pass the model's AutoProcessor. Where "
                "it cannot be loaded, it usually lacks torchvision: install the build that fits your torch."
            )
        sharded = is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
        return ImageSetup(self._processing_class, example, sharded, args.world_size)

    def _sharing_pays(self, args: ORPOConfig) -> bool:
        gain = sharing_gain(self._lengths)
        if self._lengths and gain < LEAST_SHARING_GAIN:
            logger.warning(f"prefix_sharing is off: it would save a factor of {gain:.3f} in tokens, under 1.05.")
        return not self._lengths or gain >= LEAST_SHARING_GAIN

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self._adapt(super().call_model_init(trial), self.args)

    def _adapt(self, model: nn.Module, args: ORPOConfig) -> nn.Module:
        if args.disable_dropout:
            disable_base_dropout(model)
        peft_config = self._train_parts(model, args)
        model = add_adapter(
            model,  # type: ignore[arg-type]
            peft_config,
            gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=cast(dict | None, args.gradient_checkpointing_kwargs),
            zero3=is_deepspeed_zero3_enabled(),
        )
        name_present_layers(model)
        if args.gradient_checkpointing and args.ddp_find_unused_parameters is None:
            # transformers decides so for plain models only; for an adapter DDP would search, which reentrant
            # checkpointing does not survive.
            args.ddp_find_unused_parameters = False
        coefficient = refusals.router_aux_loss_coef(model.config, args.router_aux_loss_coef)
        self.forward.adapt(model, router_aux_loss_coef=coefficient)
        if args.use_liger_kernel and not refusals.liger_knows(model):
            logger.warning(f"use_liger_kernel has no effect: Liger has no kernels for {model.config.model_type}.")
        if args.torch_compile:
            compile_blocks(model, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self._throughput = Throughput(ModelFlops.of(model), args.nll_scope)
        return model

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # The blocks are compiled (model/packed/compile.py); accelerate would compile the whole model around them.
        self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")

    def _train_parts(self, model: Any, args: ORPOConfig) -> Any:
        """Freeze the parts of a vision-language model that are not to train. Returns the settings of the adapter, which
        stays out of them."""
        if isinstance(model, PeftModel):
            if args.train_vision_tower or args.train_projector:
                logger.warning("train_vision_tower and train_projector have no effect: the adapter is there already.")
            return self._peft_config
        frozen = frozen_parts(model, train_vision_tower=args.train_vision_tower, train_projector=args.train_projector)
        freeze(model, frozen)
        return without_parts(self._peft_config, frozen)

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        per_micro_step = self._train_batch_size * args.world_size
        sampler = GlobalBatchSampler(
            self._costs(self.train_dataset, self._lengths),
            global_batch=self._global_batch,
            accumulation=-(-self._global_batch // per_micro_step),
            world_size=args.world_size,
            rank=args.process_index,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            drop_last=args.dataloader_drop_last,
        )
        return self._loader(self.train_dataset, sampler)

    # ------------------------------------------------------------------ training

    def _inner_training_loop(  # type: ignore[override]  # the Trainer calls it by these names
        self, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        with returning_freed_memory(self.args.device):
            return super()._inner_training_loop(batch_size, **kwargs)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """A smaller micro-batch means more of them: the global batch, and so the run, stays what was asked for."""
        super()._update_auto_batch_size(batch_size)
        self.args.gradient_accumulation_steps = -(-self._global_batch // (batch_size * self.args.world_size))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """All micro-batches of one optimizer step are here at once: the place to learn the totals of the global batch.
        One all-reduce per step, which also agrees on stopping; the totals travel inside the layouts, where nobody
        casts them to bf16."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        layouts = [batch["orpo_layout"] for batch in batches]
        counts = torch.stack([layout.counts() for layout in layouts]).sum(0)
        facts = torch.cat([counts.to(device), self.step_report(device)])
        facts = self.accelerator.reduce(facts, reduction="sum")
        tokens, pairs = facts[:2].unbind()
        self.begin_step(facts[2:], [i for layout in layouts for i in layout.index if i != FILLER])
        for layout in layouts:
            layout.tokens, layout.pairs = tokens, pairs
            self._throughput.add(self._lengths[i] for i in layout.index if i != FILLER)
        return batches, tokens

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = self.forward.run(model, inputs, self.args.device)
        self._train_sums.add(pair_sums(result.scores, self.objective))
        assert result.loss is not None, "get_batch_samples has written the totals"
        loss = self.poisoned(result.loss) * self.accelerator.num_processes
        return (loss, result.scores) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training event: the Trainer's own loss is exact, the metrics join it
            metrics = self._train_sums.drain(self.accelerator, self.objective)
            logs |= {name: value for name, value in metrics.items() if name != "loss"}
            logs |= self._throughput.drain(self.accelerator)
        if "train_loss" in logs:  # the sum is of the whole run, and the Trainer divides by the steps of this call
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Model FLOPs of a micro-batch, by the formula of training/throughput.py."""
        return int(self._throughput.flops_of(self._lengths[i] for i in inputs["orpo_layout"].index if i != FILLER))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._throughput.paused():
            super()._save_checkpoint(model, trial)

    # ------------------------------------------------------------------ reports

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """README.md in the output folder; TRL's arguments, which `push_to_hub` passes on."""
        if self.is_world_process_zero():
            from orpo_dist.run.model_card import write_model_card

            write_model_card(self, model_name, dataset_name, tags)


class _VerifyLayout(TrainerCallback):
    """Asks once, with the model wrapped as it will run, whether the packed layout is right for it."""

    def __init__(self, trainer: ORPOTrainer):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.forward.verify(self._trainer.model_wrapped)
