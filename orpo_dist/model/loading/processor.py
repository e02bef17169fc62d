"""The processor of a vision-language model: loaded beside the model, with the image sizes that the run asks for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.log import get_logger
from orpo_dist.errors import UserError
from orpo_dist.images import torchvision
from orpo_dist.model.loading.hub import hub_errors
from orpo_dist.model.loading.init_kwargs import model_init_kwargs
from orpo_dist.model.loading.load import load_config
from orpo_dist.model.loading.tokenizer import load_tokenizer
from orpo_dist.model.loading.vision import is_vision_language
from orpo_dist.model.patches import FIXED_IMAGE_OPTIONS, replace_attribute
from orpo_dist.model.upstream import fixed_image_options

logger = get_logger(__name__)


@dataclass(frozen=True)
class ImageSizes:
    """The image options of a processor that the run sets; the same names as in ORPOConfig.

    min_pixels, max_pixels: bounds of an image's area after resizing (Qwen-VL: 28 x 28 pixels make a token, 32 x 32 from
        Qwen3-VL on). processor_kwargs: any other option of the model's image processor (`size`, `do_image_splitting`,
        `max_patches`, ...).
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    processor_kwargs: dict[str, Any] | None = None

    def options(self) -> dict[str, Any]:
        bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return {name: value for name, value in bounds.items() if value is not None} | (self.processor_kwargs or {})


def load_processing_class(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    sizes: ImageSizes | None = None,
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer of a text model, the processor of a vision-language model; with a pad token: EOS where it has none,
    since adding a token would resize the model.

    Raises:
        UserError: not found, gated, offline, neither a pad nor an EOS token, or an image option that the processor
            does not have.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "token": token}
    processor = _load_processor(name, options) if _wants_processor(name, options) else None
    with hub_errors(name, revision):
        tokenizer = load_tokenizer(name, options) if processor is None else processor.tokenizer
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer of {name} has neither a pad nor an EOS token. Pass a processing_class with "
                "tokenizer.pad_token set to a token of its vocabulary."
            )
        tokenizer.pad_token = tokenizer.eos_token
    set_image_sizes(tokenizer if processor is None else processor, sizes or ImageSizes())
    return tokenizer if processor is None else processor


def _wants_processor(name: str, options: dict[str, Any]) -> bool:
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():  # a tokenizer or a processor by itself
        return (folder / "processor_config.json").is_file()
    return is_vision_language(load_config(name, **options))


def _load_processor(name: str, options: dict[str, Any]) -> ProcessorMixin | None:
    with hub_errors(name, options["revision"]):
        try:
            processor = AutoProcessor.from_pretrained(name, **options)
        except ImportError as error:  # torchvision or Pillow is not there; text alone needs neither
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if "torchvision" in reason.lower() and (problem := torchvision.problem()):
                reason = f"it needs torchvision, and {problem}; {torchvision.remedy()}"
            logger.warning("%s is trained on text alone: its processor cannot be loaded (%s).", name, reason)
            return None
    return processor if isinstance(processor, ProcessorMixin) else None  # a repository with a tokenizer alone


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def set_image_sizes(processing_class: PreTrainedTokenizerBase | ProcessorMixin, sizes: ImageSizes) -> None:
    """Give the image processor the options of the run. They are saved with it, so that inference sees what was trained.

    Raises:
        UserError: the processor has no such option, or rejects its value.
    """
    options = sizes.options()
    if not options:
        return
    if not isinstance(processing_class, ProcessorMixin):
        raise UserError(f"{', '.join(options)}: the model has no image processor. Leave them out.")
    own = processing_class.image_processor
    known = sorted(own.valid_kwargs.__annotations__)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(f"{', '.join(unknown)}: {type(own).__name__} has no such option. It knows {', '.join(known)}.")
    try:
        processing_class.image_processor = type(own).from_dict(own.to_dict(), **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{type(own).__name__} refuses {options}: {error}") from error
    # What a processor class fixes for its image processor (Gemma 3's do_pan_and_scan) would win over it.
    fixed = fixed_image_options(processing_class)
    if not fixed.keys().isdisjoint(options):
        own_options = {name: options.get(name, value) for name, value in fixed.items()}
        replace_attribute(processing_class, "images_kwargs", own_options, FIXED_IMAGE_OPTIONS)


def is_encoder_decoder(model: Any, args: ORPOConfig) -> bool:
    """Whether it is an encoder-decoder model, from the model, its config by name, or `args` with model_init.

    Raises:
        UserError: model_init without is_encoder_decoder, or a model that does not exist.
    """
    if isinstance(model, str):
        kwargs = model_init_kwargs(args)
        trusted = kwargs.get("trust_remote_code", args.trust_remote_code)
        return load_config(model, revision=kwargs.get("revision"), trust_remote_code=trusted).is_encoder_decoder
    if model is not None:
        return model.config.is_encoder_decoder
    if args.is_encoder_decoder is None:
        raise UserError("With model_init, say which kind of model it returns: is_encoder_decoder=False (or True).")
    return args.is_encoder_decoder


def processing_class_of(model: Any, args: ORPOConfig, given: Any) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer or processor that was given, or the one that belongs to the model, with the run's image sizes.

    Raises:
        UserError: the source of the model is unknown, it has no tokenizer, or its processor lacks an image option.
    """
    sizes = image_sizes(args)
    if given is not None:
        set_image_sizes(given, sizes)
        return given
    if model is None:
        raise UserError("With model_init, pass the tokenizer as processing_class.")
    name = model if isinstance(model, str) else model.config._name_or_path
    if not name:
        raise UserError("The model does not say where it came from: pass its tokenizer as processing_class.")
    kwargs = model_init_kwargs(args)
    trusted = kwargs.get("trust_remote_code", args.trust_remote_code)
    return load_processing_class(name, revision=kwargs.get("revision"), trust_remote_code=trusted, sizes=sizes)


def image_sizes(args: ORPOConfig) -> ImageSizes:
    kwargs = args.processor_kwargs
    assert kwargs is None or isinstance(kwargs, dict)  # ORPOConfig has checked it
    return ImageSizes(args.min_pixels, args.max_pixels, kwargs)
