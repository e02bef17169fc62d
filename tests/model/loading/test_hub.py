"""What the hub can answer, in one line that says what to do."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from orpo_dist.errors import UserError
from orpo_dist.model.loading.hub import hub_errors

RESPONSE = SimpleNamespace(headers={}, request=None)  # of either HTTP library that huggingface_hub has used


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (
            GatedRepoError("gated", response=RESPONSE),
            "some-org/model is gated: accept its licence at https://huggingface.co/some-org/model, then log in with "
            "`hf auth login`",
        ),
        (RepositoryNotFoundError("no", response=RESPONSE), "neither a folder nor a model on the hub"),
        (RevisionNotFoundError("no", response=RESPONSE), "some-org/model has no revision 'v9'"),
    ],
)
def test_errors_of_the_hub_are_one_line(cause, message):
    with pytest.raises(UserError) as caught, hub_errors("some-org/model", "v9"):
        raise OSError("You are trying to access\nsomething") from cause  # as transformers wraps them
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
