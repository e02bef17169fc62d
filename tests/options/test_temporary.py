"""Errors that end a run with 1, because another start may work, and not with 2."""

import errno
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from orpo_dist.errors import UserError
from orpo_dist.model.loading.hub import hub_errors
from orpo_dist.options.temporary import is_temporary


def answered(status: int, kind=HfHubHTTPError) -> HfHubHTTPError:
    return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=status))


@pytest.mark.parametrize(
    "error",
    [OSError(number, "x") for number in (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.ETIMEDOUT, errno.EMFILE)]
    + [TimeoutError("x"), answered(500), answered(503), answered(504), answered(429)],
)
def test_temporary(error):
    assert is_temporary(error)
    wrapped = OSError("Can't load the model")  # without number, as transformers wraps them
    wrapped.__cause__ = error
    assert is_temporary(wrapped)
    with pytest.raises(OSError, match="Can't load"), hub_errors("owner/model"):
        raise wrapped


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "x"),
        PermissionError(13, "x"),
        ConnectionRefusedError(111, "x"),
        answered(403),
        answered(404, RepositoryNotFoundError),
        OSError("Can't load"),
    ],
)
def test_not_temporary(error):
    assert not is_temporary(error)
    with pytest.raises(UserError), hub_errors("owner/model"):
        raise error
