"""What the data step may be asked for, apart from the rows themselves."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from orpo_dist.errors import UserError


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


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DataOptions:
    """How rows become pairs of token ids: the one declaration of each option's name, type, default, help and choices.

    `ORPOConfig`, `PrepareOptions`, the flags of `orpo-dist data` and the table in docs/data.md come from it. The
    metadata holds argparse's keywords only: HfArgumentParser passes all of it on.
    """

    # Options that decide what happens to bad rows or how fast the work goes, not what the token ids are. The chat
    # template enters the cache's key as the text it resolves to.
    NOT_IN_CACHE_KEY: ClassVar[frozenset[str]] = frozenset(
        {"on_bad_row", "max_bad_rows", "dataset_num_proc", "chat_template"}
    )

    max_length: int | None = _option(
        MAX_LENGTH,
        "Most tokens of prompt + completion; completions are cut at their end. None: no bound, the default of "
        "vision-language models.",
    )
    max_prompt_length: int | None = _option(
        None,
        "Most tokens of a prompt. Unset: prompts are never cut, and one that leaves no room for a completion is a bad "
        "row.",
    )
    max_completion_length: int | None = _option(
        None,
        "Most tokens of a completion, before `max_length`. Enforced for decoder models too. Encoder-decoder models "
        "default to 128.",
    )
    truncation_side: str = _option(
        "left", "End of a long prompt that `max_prompt_length` cuts off: left or right.", choices=["left", "right"]
    )
    on_bad_row: str = _option(
        "drop",
        "`drop`: leave bad rows out and list them in `dropped_rows.jsonl`; `error`: stop at the first.",
        choices=["drop", "error"],
    )
    max_bad_rows: float = _option(
        0.05,
        "With `drop`, stop before the model is loaded if more rows are bad: a share below 1, a number from 1; 0 allows "
        "none.",
    )
    chat_template: str | None = _option(
        None,
        "chatml, zephyr, a Jinja file or the template itself; saved with the model. Unset: the tokenizer's own.",
    )
    apply_chat_template: bool | None = _option(
        None,
        "Unset: message lists get the template, strings do not. True: strings become a user and an assistant turn. "
        "False: message lists are refused.",
    )
    allow_template_drops: bool = _option(
        False, "Train on rows of which the chat template leaves something out, as it renders them."
    )
    add_eos_token: bool = _option(
        True, "End each completion of plain text with EOS if it does not end with it already."
    )
    split_special_tokens: bool = _option(
        False,
        "Special tokens that rows spell (`</s>` in an answer) stay text; what the chat template writes stays special.",
    )
    prompt_column: str | None = _option(None, "Column of the prompt. Unset: detected.")
    chosen_column: str | None = _option(None, "Column of the chosen completion or conversation. Unset: detected.")
    rejected_column: str | None = _option(None, "Column of the rejected completion or conversation. Unset: detected.")
    system_column: str | None = _option(None, "Column of a system message. Unset: `system` if it exists.")
    tools_column: str | None = _option(None, "Column of the tools' JSON schemas. Unset: `tools` if it exists.")
    image_column: str | None = _option(
        None,
        "Column of the images, one or a list per row. Unset: `images` or `image` if one exists. Empty: images are "
        "ignored.",
    )
    image_folder: str | None = _option(
        None, "Folder that image paths start from and cannot leave. Unset: the folder of the row's file."
    )
    allow_image_urls: bool = _option(
        False, "Fetch images at http(s) addresses in the rows, once, when data is prepared."
    )
    allow_outside_image_folder: bool = _option(False, "Read images at paths outside of the image folder too.")
    dataset_num_proc: int | None = _option(None, "Processes that tokenise.")


@dataclass
class ImageOptions:
    """What the run asks of the model's image processor; declared once, as `DataOptions`."""

    min_pixels: int | None = _option(None, "Smallest area of an image after resizing (Qwen-VL).")
    max_pixels: int | None = _option(None, "Largest area of an image after resizing (Qwen-VL): bounds its tokens.")
    processor_kwargs: dict[str, Any] | str | None = _option(  # noqa: RUF009
        None,
        "Other options of the model's image processor (`size`, `do_image_splitting`, `max_patches`, ...); an unknown "
        "one is an error that lists the known ones. Saved with the processor.",
    )


@dataclass
class PrepareOptions(DataOptions):
    """What the data step works with: the options, resolved for one model by `orpo_dist.run.prepare`.

    A column name of `""` means that there is no such column, whatever the data set holds.
    """

    is_encoder_decoder: bool = False


def choices_of(options: type[Any]) -> dict[str, list[str]]:
    """The values that each option with a fixed choice takes."""
    return {f.name: f.metadata["choices"] for f in fields(options) if "choices" in f.metadata}


def check_prompt_length(max_length: int | None, max_prompt_length: int | None) -> None:
    """Raises UserError where max_prompt_length leaves no room within max_length."""
    if max_length is not None and max_prompt_length is not None and max_prompt_length >= max_length:
        raise UserError(
            f"max_prompt_length={max_prompt_length} leaves no room for a completion within "
            f"max_length={max_length}: lower the first or raise the second."
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
