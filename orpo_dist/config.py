"""ORPOConfig: transformers' TrainingArguments, TRL's ORPO fields under TRL's names, and this project's fields."""

import copy
import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from orpo_dist.distributed import zero
from orpo_dist.distributed.environment import (
    check_sequence_parallel,
    check_world_size,
    starts_on_cpu_alone,
)
from orpo_dist.distributed.log import get_logger
from orpo_dist.distributed.timeouts import START_SECONDS
from orpo_dist.errors import UserError
from orpo_dist.options.data import (
    ENCODER_DECODER_COMPLETION_LENGTH,
    DataOptions,
    ImageOptions,
    PrepareOptions,
    Unasked,
    check_prompt_length,
    choices_of,
)
from orpo_dist.options.durations import seconds_of
from orpo_dist.options.secrets import secrets_of, without_secrets

logger = get_logger(__name__)

NLL_SCOPES = ["sequence", "completion"]
_TRAINING_ARGUMENT_NAMES = {f.name for f in fields(TrainingArguments)}


def bf16_is_supported(use_cpu: bool) -> bool:
    """Whether the accelerator of this machine computes in bfloat16. False on a machine without one: TRL's config
    insists on bf16 there and refuses to start."""
    if use_cpu:
        return False
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.xpu.is_available()


def without_loss_kernels(liger_kernel_config: dict[str, bool] | None) -> dict[str, bool]:
    """Liger's settings for norms, rotary embeddings and MLPs alone: its loss kernels replace the model's forward, and
    with it the loss head that is in there (model/head/install.py).

    Raises:
        UserError: one of the loss kernels is asked for.
    """
    config = dict(liger_kernel_config or {})
    for name in ("cross_entropy", "fused_linear_cross_entropy"):
        if config.get(name):
            raise UserError(
                f"liger_kernel_config: {name} cannot be used, the loss has a fused head of its own. Drop it."
            )
        config[name] = False
    return config


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ORPOConfig(ImageOptions, DataOptions, TrainingArguments):
    """Settings of `ORPOTrainer`.

    A drop-in for `trl.experimental.orpo.ORPOConfig`: the same names and the same defaults, plus the fields listed
    under "This project's fields" in docs/config.md. Differences on purpose: `bf16` is switched on only where the
    accelerator has it, and `max_completion_length`, `max_prompt_length` are enforced for decoder models too.

    Raises:
        UserError: a value that contradicts another, with the name of both.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "processor_kwargs"]  # noqa: RUF012

    # -- other defaults than TrainingArguments, as in TRL --
    learning_rate: float = _option(1e-6, "The initial learning rate.")
    logging_steps: float = _option(10, "Log every X optimizer steps; below 1 a share of all steps.")
    gradient_checkpointing: bool = _option(
        True, "Recompute activations in the backward pass: less memory, about 20%% slower."
    )
    bf16: bool | None = _option(  # type: ignore[assignment]
        None, "bfloat16 mixed precision. Unset: on where the accelerator has it and fp16 is not set."
    )
    logging_nan_inf_filter: bool = _option(False, "Hide non-finite losses in the log (costs a device sync per step).")

    # -- TRL's ORPO fields --
    beta: float = _option(0.1, "Weight of the odds-ratio term: lambda in the paper, alpha in its code.")
    disable_dropout: bool = _option(True, "Switch off the base model's dropout; lora_dropout stays live.")
    padding_value: int | None = _option(None, "Token id used for padding. Unset: the tokenizer's pad token.")
    generate_during_eval: bool = _option(
        False, "Write sampled replies at each evaluation, to the run's folder and to the tracker that is on."
    )
    is_encoder_decoder: bool | None = _option(None, "Needed with model_init alone: what kind of model it returns.")
    model_init_kwargs: dict[str, Any] | str | None = _option(  # noqa: RUF009
        None, "Keyword arguments of from_pretrained when the model is given by name."
    )
    trust_remote_code: bool = _option(False, "Run Python code that a model repository ships. Off unless asked for.")

    # -- this project's fields: vision-language models --
    train_vision_tower: bool = _option(False, "Train the vision tower too; with an adapter, by LoRA on its layers.")
    train_projector: bool = _option(
        False, "Train what brings image features to the language model too; with an adapter, by LoRA."
    )
    # -- this project's fields: loss --
    nll_scope: str = _option(
        "sequence",
        "Tokens of the NLL term: prompt + chosen (paper, TRL), or the chosen completion (LLaMA-Factory, ms-swift).",
        choices=NLL_SCOPES,
    )
    label_smoothing: float = _option(0.0, "Probability that a pair's preference is flipped, as in DPO; below 0.5.")
    router_aux_loss_coef: float | None = _option(
        None,
        "Weight of a mixture-of-experts model's load-balancing loss. Unset, as in TRL: the model config's if its "
        "output_router_logits is set, else 0.",
    )

    # -- this project's fields: speed and memory --
    padding_free: bool = _option(True, "One packed row without padding per micro-batch; off: TRL's padded layout.")
    prefix_sharing: bool = _option(
        True, "Compute each pair's prompt once (packed layout). Off by itself where it would gain under 5%%."
    )
    sequence_parallel_size: int = _option(
        1, "Ranks that share each packed row (Ulysses): longer pairs, fewer pairs at once (docs/scaling.md)."
    )
    loss_chunk_size: int | None = _option(
        None, "Rows whose logits exist at once in the loss head. Unset: 512 on CPU, 1 GiB of logits elsewhere."
    )
    verify_layout: bool = _option(
        True, "Compare the packed with the padded layout on a tiny batch at start-up, and fall back if they differ."
    )

    # -- this project's fields: stopping and resuming (docs/runs.md) --
    max_runtime: str | None = _option(
        None, "Save and stop before this much time since the process began: seconds, 1h30m or HH:MM:SS."
    )
    save_timeout: int = _option(1800, "Seconds after which a save that does not end counts as hanging.")
    eval_timeout: int = _option(1800, "Seconds after which a batch of an evaluation counts as hanging.")
    last_act_timeout: int = _option(
        86400, "Seconds after which a merge, an upload or a summary counts as hanging; a step has ddp_timeout."
    )
    async_save: bool = _option(
        False, "Copy each checkpoint to host memory, and write it while training goes on (docs/runs.md)."
    )
    max_nonfinite_steps: int = _option(
        5, "End the run after so many steps in a row whose loss or gradient norm is not finite; none is applied."
    )
    allow_changed: bool = _option(False, "Resume although model, data, loss, batch or optimizer have changed.")
    strict_versions: bool = _option(False, "Refuse to resume with other library versions (a warning otherwise).")

    def __post_init__(self):
        if starts_on_cpu_alone() and not self.use_cpu:
            self.use_cpu = True
            if not parse_flag_from_env("ACCELERATE_USE_CPU"):
                logger.warning("No GPU on this machine: the launched processes train together on its CPU (gloo).")
        self._see_launched_precision()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_is_supported(self.use_cpu)
        # transformers 5.23 renamed gradient_checkpointing and warns about the old name, which is TRL's. The new name is
        # set here, so that nobody who keeps TRL's spelling is warned.
        # https://github.com/huggingface/transformers (training_args.py, "Deprecated alias of activation_checkpointing")
        if "activation_checkpointing" in _TRAINING_ARGUMENT_NAMES:
            if self.activation_checkpointing is None:
                self.activation_checkpointing = self.gradient_checkpointing
            if self.activation_checkpointing_kwargs is None:
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        self.remove_unused_columns = False  # the collator reads token columns that no forward names
        if self.use_liger_kernel:
            self.liger_kernel_config = without_loss_kernels(self.liger_kernel_config)
        # The process group starts here, and collectives may take longer before the first step than after it.
        after, self.ddp_timeout = self.ddp_timeout, max(self.ddp_timeout, START_SECONDS)
        with zero.forgetting_broken_configs():
            super().__post_init__()
        self.ddp_timeout = after
        check_world_size(self.world_size)
        check_sequence_parallel(self.sequence_parallel_size, self.world_size)
        zero.check_config(self)
        self.check()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, without credentials: the Trainer pickles its arguments into training_args.bin, which goes into
        checkpoints and to the hub. A copy keeps them."""
        hidden = secrets_of(self.__dict__)
        return self.__dict__ | {name: without_secrets({name: value}).get(name) for name, value in hidden.items()}

    def __copy__(self) -> "ORPOConfig":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "ORPOConfig":
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def _see_launched_precision(self) -> None:
        """Where neither bf16 nor fp16 is set, the accelerator runs in the precision that `accelerate launch` asks for
        by this variable, or in that of a state that was set up before: the fields then say so too."""
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        config: Any = self.accelerator_config
        uses_state = config.get("use_configured_state") if isinstance(config, dict) else False
        if (uses_state or (isinstance(config, AcceleratorConfig) and config.use_configured_state)) and is_initialized():
            launched = AcceleratorState().mixed_precision
        if self.bf16 or self.fp16 or launched == "no":
            return
        if launched not in ("bf16", "fp16"):
            raise UserError(f"mixed_precision={launched} of accelerate is not supported: use bf16, fp16 or no.")
        self.bf16, self.fp16 = launched == "bf16", launched == "fp16"

    def check(self) -> None:
        """Raises UserError for a value that contradicts another, or that no run can use. Attributes may be set after
        construction, without a check."""
        for name, allowed in (choices_of(DataOptions) | {"nll_scope": NLL_SCOPES}).items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"label_smoothing={self.label_smoothing} must lie in [0, 0.5): 0.5 and more learns nothing."
            )
        if self.beta < 0:
            raise UserError(f"beta={self.beta} is negative: that would prefer the rejected completions.")
        if self.max_bad_rows < 0:
            raise UserError(f"max_bad_rows={self.max_bad_rows} is negative; 0 allows no bad row.")
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise UserError(f"loss_chunk_size={self.loss_chunk_size} must be at least 1, or None for the default.")
        if self.max_nonfinite_steps < 1:
            raise UserError(f"max_nonfinite_steps={self.max_nonfinite_steps} must be at least 1.")
        if self.max_runtime is not None:
            seconds_of(self.max_runtime)
        for name in ("save_timeout", "eval_timeout", "last_act_timeout"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: must be above zero.")
        for name in ("max_length", "max_prompt_length", "max_completion_length", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1, or None for no bound.")
        if self.processor_kwargs is not None and not isinstance(self.processor_kwargs, dict):
            raise UserError(f"processor_kwargs={self.processor_kwargs!r} is not a mapping, nor a JSON object.")
        if self.max_length is not None and self.max_length < 2:
            raise UserError("max_length=1 leaves no room for a completion after the prompt.")
        if not isinstance(self.max_length, Unasked):  # else the model decides: model/loading/processor.py
            self.check_prompt_length()

    def check_prompt_length(self) -> None:
        """Raises UserError where max_prompt_length leaves no room within max_length."""
        check_prompt_length(self.max_length, self.max_prompt_length)

    def prepare_options(self, is_encoder_decoder: bool) -> PrepareOptions:
        """The data options of a run; encoder-decoder models get TRL's bound on completions where none is set."""
        values = {f.name: getattr(self, f.name) for f in fields(DataOptions)}
        if is_encoder_decoder and self.max_completion_length is None:
            values["max_completion_length"] = ENCODER_DECODER_COMPLETION_LENGTH
        return PrepareOptions(**values, is_encoder_decoder=is_encoder_decoder)


# The fields declared by this project, TRL's names and changed defaults included.
OWN_OPTIONS = frozenset(
    {f.name for kind in (DataOptions, ImageOptions) for f in fields(kind)} | ORPOConfig.__annotations__.keys()
)
