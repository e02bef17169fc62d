"""Errors while fetching or reading a model or an adapter, as one line that says what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from orpo_dist.errors import UserError, raised_in
from orpo_dist.model.upstream import is_unknown_architecture, wants_remote_code
from orpo_dist.options.temporary import is_temporary

_ABOUT_THE_NAME = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
_ABOUT_THE_FILES = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_BACKENDS = "transformers.utils.import_utils"
# Modules whose ValueErrors and ImportErrors say what is wrong with a name, with its files or with a loading option, or
# which package the model's own code or an option needs. Not among them: conversion of weights, the models themselves.
_READERS = (
    "huggingface_hub",
    "transformers.configuration_utils",
    "transformers.convert_slow_tokenizer",
    "transformers.dynamic_module_utils",
    "transformers.generation.configuration_utils",
    "transformers.image_processing",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.modeling_utils",
    "transformers.models.auto",
    "transformers.processing_utils",
    "transformers.quantizers",
    "transformers.tokenization_utils",
    "transformers.utils.hub",
    "transformers.utils.quantization_config",
    "transformers_modules",
    "peft.config",
    "peft.peft_model",
    "peft.tuners.tuners_utils",
    "peft.utils.save_and_load",
)


@contextmanager
def hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """Convert errors that the user can fix while `name` is fetched or read into a one-line UserError.

    Other errors propagate unchanged, with a traceback and exit code 1: a library bug is not the user's fault, and a
    restart after a full disk may help.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        if not _can_be_fixed(error):
            raise
        raise UserError(_explain(error, name, revision)) from error


def _can_be_fixed(error: Exception) -> bool:
    """Whether the user can fix it, judged by its type and, for a ValueError or ImportError, by where it was raised."""
    if is_temporary(error):
        return False
    if any(isinstance(link, _ABOUT_THE_NAME) for link in _chain(error)):
        return True
    if isinstance(error, OSError):
        # transformers raises OSErrors without errno. System errors such as a full disk are not about the name.
        return error.errno is None or isinstance(error, _ABOUT_THE_FILES)
    module = raised_in(error)
    if module == _BACKENDS:  # requires_backends; a ModuleNotFoundError is a broken import inside transformers
        return type(error) is ImportError
    if module.startswith(_READERS):
        return True
    # A config class of a family that refuses the values of the model's config.
    return module.startswith("transformers.models.") and ".configuration_" in module


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _explain(error: BaseException, name: str, revision: str | None) -> str:
    chain = _chain(error)
    page = f"https://huggingface.co/{name}"

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if wants_remote_code(error):
        return (
            f"{name} ships custom code that would have to run. Read it "
            f"{'there' if Path(name).is_dir() else f'at {page}'}, and set trust_remote_code=true if you trust it."
        )
    if is_unknown_architecture(error):
        return f"{name}: this transformers does not know the model's architecture: pip install -U transformers."
    if isinstance(error, ImportError):
        return f"{name} cannot be loaded: {_first_line(error)}"
    if name.startswith((".", "/", "~")) or os.path.isdir(name) or name.count("/") > 1:
        if not os.path.isdir(name):
            return f"{name} is neither an existing folder nor the name of a model on the hub (owner/name)."
        return f"The folder {name} cannot be loaded: {_first_line(error)}"
    if caused_by(GatedRepoError):
        return f"{name} is gated: accept its licence at {page}, then log in with `hf auth login` (or set HF_TOKEN)."
    if caused_by(RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: see {page}/branches for the existing ones."
    if caused_by(RepositoryNotFoundError, HFValidationError):
        return (
            f"{name} is neither a folder nor a model on the hub: check the name; a private one needs `hf auth login`."
        )
    if caused_by(OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError):
        return (
            f"{name} is neither a folder nor in the local cache, and the hub was not reached: run `hf download {name}` "
            "where there is a network, share that cache (HF_HOME), or unset HF_HUB_OFFLINE."
        )
    if caused_by(HfHubHTTPError):
        return f"The hub refused {name}: {_first_line(chain[-1])}"
    return f"{name} cannot be loaded: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]
