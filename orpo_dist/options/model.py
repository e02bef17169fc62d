"""What may be asked about the model: where it comes from, its precision, quantisation and adapter."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from orpo_dist.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


QUANT_STORAGES = {**DTYPES, "uint8": torch.uint8}


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """Which model, in what precision, with which adapter; the names are those of TRL's ModelConfig.

    Raises:
        UserError: options that contradict each other.
    """

    model_name_or_path: str | None = _option(None, "Model on the hub, or a folder.")
    model_revision: str = _option("main", "Branch, tag or commit of the model on the hub.")
    dtype: str | None = _option(
        None,
        "Precision of the loaded weights. Unset: float32 when all weights are trained, the precision of the "
        "computation (bf16, fp16, else float32) when only an adapter is.",
        choices=["auto", *DTYPES],
    )
    attn_implementation: str | None = _option(None, "Attention implementation, as in transformers.")
    use_peft: bool = _option(False, "Train a LoRA adapter instead of all weights.")
    adapter_name_or_path: str | None = _option(None, "Continue training this adapter, with its own settings.")
    merge_adapter: bool = _option(False, "Merge the adapter into its base after training.")
    lora_r: int = _option(16, "Rank of LoRA.")
    lora_alpha: int = _option(32, "LoRA alpha: the update is scaled by alpha / r.")
    lora_dropout: float = _option(0.05, "Dropout on the input of the adapter.")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that get an adapter. Unset: all-linear, every linear layer but the output head."},
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Parameters without a linear layer that get an adapter: a mixture's fused experts."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter."}
    )
    use_rslora: bool = _option(False, "Rank-stabilised LoRA: scale by alpha / sqrt(r).")
    use_dora: bool = _option(False, "DoRA: train direction and magnitude apart.")
    load_in_4bit: bool = _option(False, "Quantise the base to 4 bits (QLoRA). Needs an adapter.")
    load_in_8bit: bool = _option(False, "Quantise the base to 8 bits. Needs an adapter.")
    bnb_4bit_quant_type: str = _option("nf4", "4-bit data type.", choices=["nf4", "fp4"])
    use_bnb_nested_quant: bool = _option(True, "Double quantisation: quantise the quantisation constants too.")
    bnb_4bit_quant_storage: str | None = _option(
        None,
        "Type that the 4-bit weights are stored as. Unset: the precision of the computation, which ZeRO-3 and FSDP2 "
        "can shard.",
        choices=list(QUANT_STORAGES),
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("load_in_4bit and load_in_8bit are both set: choose one.")
        if (self.load_in_4bit or self.load_in_8bit) and not self.trains_adapter:
            option = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            raise UserError(
                f"{option} without an adapter: quantised weights are rounded to a few levels and cannot be trained. "
                "Set use_peft=true (QLoRA), or leave quantisation out."
            )

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained, a new one or a given one."""
        return self.use_peft or self.adapter_name_or_path is not None


def compute_dtype(bf16: bool | None, fp16: bool) -> torch.dtype:
    """Precision of the matrix products under the trainer's mixed-precision options."""
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def resolve_dtype(
    arguments: ModelArguments, *, bf16: bool | None = False, fp16: bool = False
) -> torch.dtype | Literal["auto"]:
    """Precision the weights are loaded in.

    Trained weights stay in float32 (mixed precision casts them for the computation only): an update far below a
    bfloat16 step would be lost. A frozen base needs no more than the precision of the computation.

    Raises:
        UserError: float16 weights that are to be trained; gradient scaling does not work on them.
    """
    if arguments.dtype == "auto":
        return "auto"
    if arguments.dtype is None:
        return compute_dtype(bf16, fp16) if arguments.trains_adapter else torch.float32
    dtype = parse_dtype(arguments.dtype)
    if dtype == torch.float16 and not arguments.trains_adapter:
        raise UserError(
            "dtype=float16 without an adapter: float16 weights cannot be trained (their gradients overflow and cannot "
            "be unscaled). Leave dtype unset and use fp16=true for float16 computation, or train an adapter."
        )
    return dtype


def parse_dtype(name: str) -> torch.dtype:
    """`bfloat16`, `float16` or `float32` as a torch dtype. Raises UserError on anything else."""
    if name not in DTYPES:
        raise UserError(f"dtype={name!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[name]
