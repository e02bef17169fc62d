"""What the data step may be asked for, apart from the rows themselves."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orpo_dist.errors import UserError

if TYPE_CHECKING:  # `orpo-dist data check` needs no torch, and the config imports it
    from orpo_dist.config import ORPOConfig


class Unasked(int):
    """A default, told apart from the same number when somebody asks for it."""


# TRL's default. Vision-language models have none unless one is asked for: an image of Qwen2-VL takes up to 1,280 tokens
# by the processor's defaults, and up to 16,384 by the settings that are saved with the model.
# https://huggingface.co/Qwen/Qwen2-VL-7B-Instruct/blob/main/preprocessor_config.json
MAX_LENGTH = Unasked(1024)


def asked_length(max_length: int | None, reads_images: bool) -> int | None:
    """The bound that option max_length means for a model that reads images or text alone."""
    if isinstance(max_length, Unasked):
        return None if reads_images else int(max_length)
    return max_length


ENCODER_DECODER_COMPLETION_LENGTH = 128  # TRL's default of max_completion_length for these models


@dataclass(frozen=True)
class PrepareOptions:
    """The data fields of `ORPOConfig` under the same names; docs/data.md explains each.

    A column name of `""` means that there is no such column, whatever the data set holds.
    """

    max_length: int | None = MAX_LENGTH
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_side: str = "left"
    on_bad_row: str = "drop"
    max_bad_rows: float = 0.05
    chat_template: str | None = None
    apply_chat_template: bool | None = None
    add_eos_token: bool = True
    prompt_column: str | None = None
    chosen_column: str | None = None
    rejected_column: str | None = None
    system_column: str | None = None
    tools_column: str | None = None
    image_column: str | None = None
    image_folder: str | None = None
    allow_image_urls: bool = False
    allow_outside_image_folder: bool = False
    is_encoder_decoder: bool = False
    num_proc: int | None = None

    @classmethod
    def from_config(cls, config: "ORPOConfig", is_encoder_decoder: bool) -> "PrepareOptions":
        """The data fields of `config`; encoder-decoder models get TRL's bound on completions where none is set."""
        max_completion_length = config.max_completion_length
        if is_encoder_decoder and max_completion_length is None:
            max_completion_length = ENCODER_DECODER_COMPLETION_LENGTH
        return cls(
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=max_completion_length,
            truncation_side=config.truncation_side,
            on_bad_row=config.on_bad_row,
            max_bad_rows=config.max_bad_rows,
            chat_template=config.chat_template,
            apply_chat_template=config.apply_chat_template,
            add_eos_token=config.add_eos_token,
            prompt_column=config.prompt_column,
            chosen_column=config.chosen_column,
            rejected_column=config.rejected_column,
            system_column=config.system_column,
            tools_column=config.tools_column,
            image_column=config.image_column,
            image_folder=config.image_folder,
            allow_image_urls=config.allow_image_urls,
            allow_outside_image_folder=config.allow_outside_image_folder,
            is_encoder_decoder=is_encoder_decoder,
            num_proc=config.dataset_num_proc,
        )


@dataclass
class DataArguments:
    """Which rows; the first five names are those of TRL's ScriptArguments.

    Raises:
        UserError: options that contradict each other.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Rows: a file (JSONL, JSON, CSV, Parquet), a folder, or a dataset on the hub."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on; also `config:split`."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on before, during and after training. Unset: none."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Stream a hub dataset into the cache instead of downloading all its files."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Use the first N rows of each split only."})
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Rows of the training split held out for evaluation: a share below 1, or a number."},
    )

    def __post_init__(self) -> None:
        if self.test_split_size is None:
            return
        if self.dataset_test_split is not None:
            raise UserError(
                f"dataset_test_split={self.dataset_test_split} and test_split_size={self.test_split_size}: "
                "choose one, a split of its own or rows held out of the training split."
            )
        if self.dataset_streaming:
            raise UserError("test_split_size cannot hold rows out of a stream: set dataset_streaming=false.")
        if self.test_split_size <= 0 or (self.test_split_size > 1 and self.test_split_size % 1):
            raise UserError(
                f"test_split_size={self.test_split_size} must be a share between 0 and 1 or a number of rows."
            )
