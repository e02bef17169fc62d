"""ORPOTrainer: a transformers.Trainer whose gradients do not depend on how the global batch is cut.

    rows -> prepare_pairs -> GlobalBatchSampler (one bin of pairs per rank and micro-step) -> collator (+ layout)
         -> get_batch_samples: one all-reduce of (tokens, pairs) per optimizer step, written into each layout
         -> compute_loss: this micro-batch's share of the global loss, times the data-parallel size

DDP, ZeRO and FSDP2 all average gradients over the ranks while the shares of the loss add up: hence the last factor.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from orpo_dist.config import ORPOConfig
from orpo_dist.data.options import PrepareOptions
from orpo_dist.errors import UserError
from orpo_dist.loss import Objective, PairScores, orpo_loss, pair_sums
from orpo_dist.model.adapters import add_adapter, disable_base_dropout
from orpo_dist.model.load import load_config, load_model, load_processing_class
from orpo_dist.packing.foreign import ForeignCollator
from orpo_dist.packing.padded import EncoderDecoderCollator, PaddedCollator, PaddedLayout, score_padded
from orpo_dist.packing.sampler import (
    FILLER,
    EvaluationSampler,
    GlobalBatchSampler,
    PairDataLoader,
    PairDataset,
    is_tokenised,
    pair_costs,
    pair_lengths,
)
from orpo_dist.runtime.metrics import MetricSums

if TYPE_CHECKING:
    from orpo_dist.data.prepare import PreparedPairs


class ORPOTrainer(Trainer):
    """Trainer for odds-ratio preference optimisation; a drop-in for `trl.experimental.orpo.ORPOTrainer`.

    Args:
        model: a model, or the name or path of one (loaded after the data was audited).
        args: an `ORPOConfig`.
        data_collator: a collator written for TRL's trainer; unset, the built-in one.
        train_dataset, eval_dataset: rows of preference pairs in any format of docs/data.md, or rows that are tokenised
            already (`prompt_ids`, `chosen_ids`, `rejected_ids`). `eval_dataset` may be a dict or a DatasetDict.
        processing_class: the tokenizer; unset, the one of the model.
        model_init: a function that returns the model, instead of `model`.
        compute_metrics: receives an `EvalPrediction` whose predictions are two (n,) arrays, the mean log-probabilities
            of the chosen and of the rejected completions, in the order of the evaluation set.
        preprocess_logits_for_metrics: refused: logits are never gathered.
        peft_config: adapter to add.

    Raises:
        UserError: options that contradict each other, data that cannot be trained on, a model that cannot be loaded.
    """

    # compute_loss divides by the totals of the whole global batch, so training_step must not divide again.
    loss_is_scaled_for_ga = True
    _tag_names = ["orpo", "orpo_dist"]

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: ORPOConfig | None = None,
        data_collator: Callable[[list[dict]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
    ):
        args = ORPOConfig("trainer_output") if args is None else args
        _refuse_what_needs_logits(args, preprocess_logits_for_metrics)
        _refuse_unsupported_parallelism(args)
        if train_dataset is None and eval_dataset is None:
            raise UserError("train_dataset is missing: pass rows of preference pairs.")
        if (model is None) == (model_init is None):
            raise UserError("Pass either model or model_init, and not both.")
        if not isinstance(model, str) and args.model_init_kwargs:
            raise UserError("model_init_kwargs needs the model given by name or path; this one is instantiated already.")

        self.objective = Objective(beta=args.beta, label_smoothing=args.label_smoothing)
        self._peft_config = peft_config
        self.is_encoder_decoder = _is_encoder_decoder(model, args)
        tokenizer = processing_class or _tokenizer_of(model, args)
        self._prepare_options = PrepareOptions.from_config(args, self.is_encoder_decoder)
        self._tokenizer = tokenizer
        self.prepared: dict[str, PreparedPairs] = {}
        self._run_folder = Path(args.output_dir)
        if train_dataset is not None:
            train_dataset = self._tokenised(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._tokenised(rows, f"eval_{name}") for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._tokenised(eval_dataset, "eval")

        set_seed(args.seed)  # a new adapter is initialised at random
        if isinstance(model, str):
            model = load_model(model, trust_remote_code=args.trust_remote_code, **_model_init_kwargs(args))
        if model is not None:
            model = self._adapt(model, args)
        self.data_collator_is_foreign = data_collator is not None
        self._train_sums, self._eval_sums = MetricSums(), MetricSums()
        self._eval_rows: list[tuple[int, float, float]] | None = None

        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            self.args._n_gpu = 1  # DataParallel would split the padded batch between chosen and rejected
        self._refuse_batch_size_search()
        self.data_collator = self._collator(data_collator)
        self._global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.model.add_model_tags(self._tag_names)
        if args.generate_during_eval:
            from orpo_dist.runtime.samples import SampleReplies

            self.add_callback(SampleReplies(self))

    # ------------------------------------------------------------------ model and data

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self._adapt(super().call_model_init(trial), self.args)

    def _adapt(self, model: nn.Module, args: ORPOConfig) -> nn.Module:
        if args.disable_dropout:
            disable_base_dropout(model)
        model = add_adapter(
            model,
            self._peft_config,
            gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            zero3=is_deepspeed_zero3_enabled(),
        )
        self._router_aux_loss_coef = _router_aux_loss_coef(model.config, args.router_aux_loss_coef)
        return model

    def _collator(self, foreign: Callable | None) -> Callable[[list[dict]], dict[str, Any]]:
        pad = self.args.padding_value if self.args.padding_value is not None else self._tokenizer.pad_token_id
        if self.is_encoder_decoder:
            if foreign is not None:
                raise UserError("data_collator cannot be replaced for encoder-decoder models: leave it unset.")
            start = self.model.config.decoder_start_token_id
            if start is None:
                raise UserError("The model's config has no decoder_start_token_id; set it (for T5 it is the pad token).")
            return EncoderDecoderCollator(pad, start)
        if foreign is not None:
            return ForeignCollator(foreign, pad, self.args.nll_scope)
        return PaddedCollator(pad, self.args.nll_scope)

    def _tokenised(self, rows: Any, name: str) -> Any:
        if is_tokenised(rows):
            return rows
        # Imported here: rows that are tokenised already train on a machine without the datasets package.
        from orpo_dist.data.prepare import prepare_pairs

        prepared = prepare_pairs(
            rows,
            self._tokenizer,
            self._prepare_options,
            name=name,
            dropped_rows_path=self._run_folder / "dropped_rows.jsonl",
        )
        self.prepared[name] = prepared
        return prepared.dataset

    def _loader(self, rows: Any, sampler: GlobalBatchSampler | EvaluationSampler) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return PairDataLoader(
            PairDataset(rows, filler_id=self._tokenizer.pad_token_id or 0),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _costs(self, rows: Any) -> list[float]:
        prompt, chosen, rejected = pair_lengths(rows)
        return pair_costs(prompt, chosen, rejected, self.model.config.get_text_config().hidden_size)

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        per_micro_step = self._train_batch_size * args.world_size
        sampler = GlobalBatchSampler(
            self._costs(self.train_dataset),
            global_batch=self._global_batch,
            accumulation=-(-self._global_batch // per_micro_step),
            world_size=args.world_size,
            rank=args.process_index,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            drop_last=args.dataloader_drop_last,
        )
        return self._loader(self.train_dataset, sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]
        if rows is None:
            raise UserError("Evaluation needs rows: pass eval_dataset to the trainer or to evaluate().")
        return self.get_test_dataloader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        rows = self._tokenised(test_dataset, "test")
        args = self.args
        sampler = EvaluationSampler(
            self._costs(rows), batch_size=args.eval_batch_size, world_size=args.world_size, rank=args.process_index
        )
        return self._loader(rows, sampler)

    # ------------------------------------------------------------------ training

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """A smaller micro-batch means more of them: the global batch, and so the run, stays what was asked for."""
        super()._update_auto_batch_size(batch_size)
        self.args.gradient_accumulation_steps = -(-self._global_batch // (batch_size * self.args.world_size))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        """All micro-batches of one optimizer step are here at once: the place to learn the totals of the global batch.
        One all-reduce per step; they travel inside the layouts, where nobody casts them to bf16."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = torch.stack([batch["orpo_layout"].counts() for batch in batches]).sum(0)
            tokens, pairs = self.accelerator.reduce(counts.to(device), reduction="sum").unbind()
            for batch in batches:
                batch["orpo_layout"].tokens, batch["orpo_layout"].pairs = tokens, pairs
        return batches, None

    def _scores(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[PairScores, torch.Tensor | None]:
        """Scores of a micro-batch's pairs, and the router's load-balancing loss where there is one."""
        layout: PaddedLayout = inputs["orpo_layout"].to(self.args.device)
        tensors = {name: value for name, value in inputs.items() if name != "orpo_layout"}
        if self._router_aux_loss_coef:
            tensors["output_router_logits"] = True
        outputs = model(**tensors, use_cache=False)
        return score_padded(outputs.logits, layout), outputs.aux_loss if self._router_aux_loss_coef else None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        layout = inputs["orpo_layout"]
        scores, aux_loss = self._scores(model, inputs)
        loss = orpo_loss(scores, self.objective, layout.tokens, layout.pairs)
        if aux_loss is not None:
            share = (scores.weight * scores.nll_tokens).sum() / layout.tokens
            loss = loss + self._router_aux_loss_coef * share * aux_loss
        self._train_sums.add(pair_sums(scores, self.objective))
        loss = loss * self.accelerator.num_processes
        return (loss, scores) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training event: the Trainer's own loss is exact, the metrics join it
            metrics = self._train_sums.drain(self.accelerator, self.objective)
            logs |= {name: value for name, value in metrics.items() if name != "loss"}
        super().log(logs, start_time)

    # ------------------------------------------------------------------ evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores, _ = self._scores(model, inputs)
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
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        metrics = self._eval_sums.drain(self.accelerator, self.objective)
        predictions = labels = None
        if self._eval_rows is not None:
            rows = sorted(row for row in gather_object(self._eval_rows) if row[0] != FILLER)
            predictions = tuple(np.array([row[side] for row in rows]) for side in (1, 2))
            labels = np.zeros(len(rows))  # as in TRL: a pair has no label beyond its order
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        prefix = f"{metric_key_prefix}_"
        prefixed = {key if key.startswith(prefix) else prefix + key: value for key, value in metrics.items()}
        return EvalLoopOutput(predictions, labels, {**output.metrics, **prefixed}, len(dataloader.dataset))

    # ------------------------------------------------------------------ reports

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """README.md in the output folder; with TRL's arguments, which `push_to_hub` passes on."""
        if self.is_world_process_zero():
            from orpo_dist.runtime.card import write_model_card

            write_model_card(self, model_name, dataset_name, tags)

    def _refuse_batch_size_search(self) -> None:
        if self.args.auto_find_batch_size and self.args.world_size > 1:
            raise UserError(
                "auto_find_batch_size works in one process only: with ZeRO-3, FSDP2 or several ranks, one rank that "
                "runs out of memory leaves the others waiting in a collective. Set per_device_train_batch_size and "
                "gradient_accumulation_steps instead."
            )


def _is_encoder_decoder(model: Any, args: ORPOConfig) -> bool:
    if isinstance(model, str):
        revision = _model_init_kwargs(args).get("revision")
        return load_config(model, revision=revision, trust_remote_code=args.trust_remote_code).is_encoder_decoder
    if model is not None:
        return model.config.is_encoder_decoder
    if args.is_encoder_decoder is None:
        raise UserError("With model_init, say which kind of model it returns: is_encoder_decoder=False (or True).")
    return args.is_encoder_decoder


def _tokenizer_of(model: Any, args: ORPOConfig) -> PreTrainedTokenizerBase:
    if model is None:
        raise UserError("With model_init, pass the tokenizer as processing_class.")
    name = model if isinstance(model, str) else model.config._name_or_path
    if not name:
        raise UserError("The model does not say where it came from: pass its tokenizer as processing_class.")
    revision = _model_init_kwargs(args).get("revision")
    return load_processing_class(name, revision=revision, trust_remote_code=args.trust_remote_code)


def _model_init_kwargs(args: ORPOConfig) -> dict[str, Any]:
    kwargs = args.model_init_kwargs
    if isinstance(kwargs, str):
        raise UserError(f"model_init_kwargs is not a JSON object: {kwargs!r}.")
    return dict(kwargs or {})


def _router_aux_loss_coef(config: Any, asked: float | None) -> float:
    """Weight of the load-balancing loss: as asked, else the model's own; 0 for a model without routers."""
    declared = config.get_text_config().to_dict().get("router_aux_loss_coef")
    if declared is None:
        if asked:
            raise UserError(
                f"router_aux_loss_coef={asked} needs a mixture-of-experts model; {config.model_type} has no routers."
            )
        return 0.0
    return declared if asked is None else asked


def _refuse_what_needs_logits(args: ORPOConfig, preprocess_logits_for_metrics: Any) -> None:
    reason = "compute_metrics receives per-pair log-probabilities; logits are never gathered"
    if preprocess_logits_for_metrics is not None:
        raise UserError(f"preprocess_logits_for_metrics cannot be used: {reason}.")
    if args.batch_eval_metrics:
        raise UserError(f"batch_eval_metrics cannot be used: {reason}, and they are computed over the whole set.")
    if args.include_for_metrics:
        raise UserError(f"include_for_metrics={args.include_for_metrics} cannot be used: {reason}.")
    if args.label_smoothing_factor:
        raise UserError("label_smoothing_factor smooths token labels, not preferences: use label_smoothing.")


def _refuse_unsupported_parallelism(args: ORPOConfig) -> None:
    parallelism = args.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise UserError(
            "Tensor, context and sequence parallelism are not supported: torch's context parallelism strips attention "
            "masks. Use data parallelism (DDP, ZeRO, FSDP2)."
        )
