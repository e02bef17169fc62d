"""What a run needs before training: tokenizer or processor, tokenised pairs, the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Sharding, loading_sharding
from orpo_dist.errors import UserError
from orpo_dist.options.model import ModelArguments
from orpo_dist.recipe.recipe import Recipe

if TYPE_CHECKING:
    from orpo_dist.data.prepare import PreparedPairs
    from orpo_dist.data.splits import RunPairs


def prepare(recipe: Recipe, folder: Path) -> "tuple[PreTrainedTokenizerBase | ProcessorMixin, RunPairs]":
    """The tokenizer or processor and the tokenised pairs of a run, from the cache where they are there. Raises
    UserError."""
    from orpo_dist.data.chat_template import resolve_chat_template
    from orpo_dist.data.prepare import prepare_pairs
    from orpo_dist.data.splits import RunPairs, load_splits
    from orpo_dist.model.loading.load import load_config
    from orpo_dist.model.loading.processor import image_sizes, load_processing_class, resolve_max_length, tokenizer_of
    from orpo_dist.options.data import PrepareOptions

    name, args = str(recipe.model.model_name_or_path), recipe.training
    source: dict[str, Any] = {"revision": recipe.model.model_revision, "trust_remote_code": args.trust_remote_code}
    processing_class = load_processing_class(name, **source, sizes=image_sizes(args))
    tokenizer = tokenizer_of(processing_class)
    if args.chat_template is not None:  # the one that is trained is saved with the model
        processing_class.chat_template = tokenizer.chat_template = resolve_chat_template(
            args.chat_template, processing_class
        )
    resolve_max_length(args, processing_class)
    options = PrepareOptions.from_config(args, load_config(name, **source).is_encoder_decoder)
    train_rows, eval_rows = load_splits(recipe.data, args.seed)

    def prepared(rows: Any, split: str) -> "PreparedPairs":
        return prepare_pairs(
            rows, processing_class, options, name=split, dropped_rows_path=folder / "dropped_rows.jsonl"
        )

    train_pairs = prepared(train_rows, "train")
    return processing_class, RunPairs(train_pairs, prepared(eval_rows, "eval") if eval_rows is not None else None)


def load_model_of(arguments: "ModelArguments", args: "ORPOConfig") -> "PreTrainedModel | PeftModel":
    """The base model in the precision the run needs; with the adapter that is to be continued, if there is one."""
    from orpo_dist.model.loading.adapters import add_adapter
    from orpo_dist.model.loading.load import load_model, quantization_config
    from orpo_dist.options.model import compute_dtype, resolve_dtype

    options: dict[str, Any] = {
        "revision": arguments.model_revision,
        "dtype": resolve_dtype(arguments, bf16=args.bf16, fp16=args.fp16),
        "attn_implementation": arguments.attn_implementation,
        "quantization_config": quantization_config(arguments, compute_dtype(args.bf16, args.fp16)),
        "trust_remote_code": args.trust_remote_code,
    }
    # They are used up here; the trainer wants them only beside a model given by name.
    extra, args.model_init_kwargs = args.model_init_kwargs or {}, None
    if not isinstance(extra, dict):
        raise UserError(f"model_init_kwargs={extra!r} is not a mapping, nor a JSON object.")
    model = load_model(str(arguments.model_name_or_path), **(options | extra))
    if arguments.adapter_name_or_path is None:
        return model
    return add_adapter(
        model,
        adapter_name_or_path=arguments.adapter_name_or_path,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs=cast("dict[str, Any] | None", args.gradient_checkpointing_kwargs),
        zero3=loading_sharding() is Sharding.ZERO3,
    )


def peft_config_of(arguments: "ModelArguments", model: "PreTrainedModel | PeftModel") -> "LoraConfig | None":
    from orpo_dist.model.loading.adapters import lora_config

    return lora_config(arguments, is_encoder_decoder=model.config.is_encoder_decoder)


@dataclass(frozen=True)
class Preparation:
    processing_class: Any
    options: Any

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        from orpo_dist.model.loading.processor import tokenizer_of

        return tokenizer_of(self.processing_class)

    def pairs(self, rows: Any, name: str, dropped_rows_path: Path | None = None) -> "PreparedPairs":
        from orpo_dist.data.prepare import prepare_pairs

        return prepare_pairs(rows, self.processing_class, self.options, name=name, dropped_rows_path=dropped_rows_path)


def preparation_of(
    args: ORPOConfig, model: Any, processing_class: Any = None, *, revision: str | None = None
) -> Preparation:
    import copy

    from orpo_dist.model.loading.processor import is_encoder_decoder, processing_class_of, resolve_max_length
    from orpo_dist.options.data import PrepareOptions

    args = copy.copy(args)
    kind = is_encoder_decoder(model, args)
    processing_class = processing_class_of(model, args, processing_class)
    resolve_max_length(args, processing_class)
    return Preparation(processing_class, PrepareOptions.from_config(args, kind))
