"""Checks the hub login before a run that pushes its model, and keeps the token out of checkpoints."""

import os

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import TrainingArguments

from orpo_dist.errors import UserError
from orpo_dist.options.temporary import is_temporary


def move_token_to_environment(args: TrainingArguments) -> None:
    """Move `hub_token` to HF_TOKEN, where the hub client looks for it.

    The Trainer pickles its arguments into training_args.bin, which would carry the token into every checkpoint.
    """
    if args.hub_token is not None:
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None


def check_login() -> None:
    """Raises UserError before training if the hub would reject the push at the end."""
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise UserError("push_to_hub needs a login: `hf auth login`, or set HF_TOKEN.") from error
    except OfflineModeIsEnabled as error:
        raise UserError("push_to_hub cannot work offline: unset HF_HUB_OFFLINE, or set push_to_hub=false.") from error
    except Exception as error:  # network errors come from the client's HTTP library, which differs between versions
        if is_temporary(error):
            raise
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise UserError(f"push_to_hub: the hub rejected the login or could not be reached ({reason}).") from error
