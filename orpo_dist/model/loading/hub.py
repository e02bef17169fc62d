"""What can go wrong when a model or an adapter is fetched or read, in one line that says what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from orpo_dist.errors import UserError
from orpo_dist.model.upstream import is_unknown_architecture, wants_remote_code


@contextmanager
def hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn an error while `name` is fetched or read into a UserError of one line that says what to do."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_explain(error, name, revision)) from error


def _explain(error: BaseException, name: str, revision: str | None) -> str:
    chain = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    page = f"https://huggingface.co/{name}"

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if wants_remote_code(error):
        return (
            f"{name} ships Python code of its own that would have to run. Read it at {page}, and set "
            "trust_remote_code=true if you trust it."
        )
    if is_unknown_architecture(error):
        return f"{name}: this transformers does not know the model's architecture: pip install -U transformers."
    if isinstance(error, ImportError):
        return f"{name} cannot be loaded: {_first_line(error)}"
    if name.startswith((".", "/", "~")) or os.path.isdir(name) or name.count("/") > 1:
        if not os.path.isdir(name):
            return f"{name}: there is no such folder, and it is not the name of a model on the hub (owner/name)."
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
