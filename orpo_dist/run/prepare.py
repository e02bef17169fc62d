"""What a run needs before training: tokenizer or processor, tokenised pairs, the model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Sharding, loading_sharding
from orpo_dist.model.loading.init_kwargs import model_init_kwargs
from orpo_dist.model.loading.load import load_config
from orpo_dist.model.loading.processor import (
    image_sizes,
    is_encoder_decoder,
    load_processing_class,
    processing_class_of,
    tokenizer_of,
)
from orpo_dist.options.data import PrepareOptions, asked_length, check_prompt_length
from orpo_dist.options.model import ModelArguments
from orpo_dist.recipe.recipe import Recipe

if TYPE_CHECKING:  # they import `datasets`, which training on rows that are tokenised already does without
    from orpo_dist.data.prepare import PreparedPairs
    from orpo_dist.data.splits import RunPairs


@dataclass(frozen=True)
class Preparation:
    """What turns rows into pairs: the tokenizer or processor (chat template and image sizes applied) and the options,
    with max_length and is_encoder_decoder resolved for the model."""

    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    options: PrepareOptions

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self.processing_class)

    def pairs(self, rows: Any, name: str, dropped_rows_path: Path | None = None) -> "PreparedPairs":
        """The audited and tokenised rows, see `prepare_pairs`; `name` is what messages call them. Raises UserError."""
        from orpo_dist.data.prepare import prepare_pairs

        return prepare_pairs(rows, self.processing_class, self.options, name=name, dropped_rows_path=dropped_rows_path)


def preparation_of(
    args: ORPOConfig,
    model: PreTrainedModel | nn.Module | str | None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    *,
    revision: str | None = None,
) -> Preparation:
    """The preparation of a run of `model`; `args` is not changed.

    A tokenizer or processor that is loaded here gets the run's chat template, so that the one that is trained is saved
    with the model. One that the caller passes keeps its own; the data step renders with the run's all the same.

    Args:
        model: the model, its name or folder, or None with `model_init`.
        revision: of a model given by name; unset, the one in `args.model_init_kwargs`.

    Raises:
        UserError: the model or its tokenizer cannot be had, an image option that the processor does not have, a prompt
            length that leaves no room, or a chat template that cannot be read.
    """
    if isinstance(model, str) and revision is not None:
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": args.trust_remote_code}
        if processing_class is None:
            loaded = load_processing_class(model, **source, sizes=image_sizes(args))
        else:
            loaded = processing_class_of(model, args, processing_class)
        encoder_decoder = load_config(model, **source).is_encoder_decoder
    else:
        encoder_decoder = is_encoder_decoder(model, args)
        loaded = processing_class_of(model, args, processing_class)
    if args.chat_template is not None and processing_class is None:
        from orpo_dist.data.chat_template import resolve_chat_template

        template = resolve_chat_template(args.chat_template, loaded)
        loaded.chat_template = tokenizer_of(loaded).chat_template = template
    max_length = asked_length(args.max_length, isinstance(loaded, ProcessorMixin))
    check_prompt_length(max_length, args.max_prompt_length)
    return Preparation(loaded, replace(args.prepare_options(encoder_decoder), max_length=max_length))


def prepare(recipe: Recipe, folder: Path) -> "tuple[PreTrainedTokenizerBase | ProcessorMixin, RunPairs]":
    """The tokenizer or processor and the tokenised pairs of a run, from the cache where they are there. Raises
    UserError."""
    from orpo_dist.data.splits import RunPairs, load_splits

    args = recipe.training
    model_init_kwargs(args)  # refused before rows are read
    preparation = preparation_of(args, str(recipe.model.model_name_or_path), revision=recipe.model.model_revision)
    args.max_length = preparation.options.max_length  # what recipe.yaml of the run states
    train_rows, eval_rows = load_splits(recipe.data, args.seed)
    dropped = folder / "dropped_rows.jsonl"
    train_pairs = preparation.pairs(train_rows, "train", dropped)
    eval_pairs = preparation.pairs(eval_rows, "eval", dropped) if eval_rows is not None else None
    return preparation.processing_class, RunPairs(train_pairs, eval_pairs)


def load_model_of(arguments: "ModelArguments", args: "ORPOConfig") -> "PreTrainedModel | PeftModel":
    """The base model in the precision the run needs; with the adapter that is to be continued, if there is one. Every
    rank must call it.

    Raises:
        UserError: they cannot be loaded, or are a checkpoint of a run that is damaged.
    """
    from orpo_dist.model.loading.adapters import add_adapter
    from orpo_dist.model.loading.load import load_model, quantization_config
    from orpo_dist.options.model import compute_dtype, resolve_dtype
    from orpo_dist.run.verified import check_if_checkpoint

    for folder in (arguments.model_name_or_path, arguments.adapter_name_or_path):
        check_if_checkpoint(folder)
    options: dict[str, Any] = {
        "revision": arguments.model_revision,
        "dtype": resolve_dtype(arguments, bf16=args.bf16, fp16=args.fp16),
        "attn_implementation": arguments.attn_implementation,
        "quantization_config": quantization_config(arguments, compute_dtype(args.bf16, args.fp16)),
        "trust_remote_code": args.trust_remote_code,
    }
    # They are used up here; the trainer wants them only beside a model given by name.
    extra, args.model_init_kwargs = model_init_kwargs(args), None
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
