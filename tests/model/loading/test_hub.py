"""Which errors of reading a model are the user's, with one line, and which go up as they are."""

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


def raised_by(module: str, error: Exception):
    """Raises `error` in a module of that name."""
    exec("raise error", {"__name__": module, "error": error})


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("transformers.models.auto.configuration_auto", ValueError("Unrecognized model in some-org/model.")),
        ("transformers.models.llama.configuration_llama", ValueError("rope_type")),
        ("transformers.utils.import_utils", ImportError("LlavaProcessor requires the PIL library")),
        ("transformers.quantizers.quantizer_bnb_4bit", ImportError("requires bitsandbytes")),
        ("peft.config", ValueError("Can't find 'adapter_config.json'")),
        ("json.decoder", FileNotFoundError(2, "No such file or directory")),
        ("urllib3", ConnectionRefusedError(111, "Connection refused")),
    ],
)
def test_what_the_user_can_fix_is_one_line(module, error):
    with pytest.raises(UserError), hub_errors("some-org/model"):
        raised_by(module, error)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("transformers.core_model_loading", ValueError("Undefined Operation encountered!")),
        ("transformers.models.llama.modeling_llama", ValueError("too many values to unpack")),
        ("transformers.models.llama.modeling_llama", ImportError("cannot import name 'cache'")),
        ("transformers.utils.import_utils", ModuleNotFoundError("Could not import module 'LlamaForCausalLM'.")),
        ("torch.nn.modules.module", ValueError("a bug")),
        ("orpo_dist.model.loading.load", ValueError("a bug")),
        ("transformers.modeling_utils", AttributeError("a bug")),
        ("huggingface_hub.file_download", OSError(28, "No space left on device")),
    ],
)
def test_what_the_user_cannot_fix_goes_up(module, error):
    with pytest.raises(type(error)) as caught, hub_errors("some-org/model"):
        raised_by(module, error)
    assert caught.value is error
