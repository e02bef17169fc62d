"""Experiment trackers that are requested but unavailable: warn and continue."""

import difflib
import netrc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from orpo_dist.distributed.log import get_logger
from orpo_dist.errors import UserError

logger = get_logger(__name__)

_PACKAGES = {"comet_ml": "comet-ml", "codecarbon": "codecarbon", "azure_ml": "azureml-mlflow"}
_COMET_CONFIG = Path("~/.comet.config")


def usable_trackers(asked: list[str]) -> list[str]:
    """The trackers of `asked` (the resolved `report_to`) that this machine can use.

    A tracker without its package is left out. Weights & Biases and Comet without a key log offline, into local files.
    Every rank calls it, since each reads its own environment; only the main process warns.

    Raises:
        UserError: a name that transformers does not know.
    """
    available = get_available_reporting_integrations()
    usable = []
    for name in asked:
        if name not in INTEGRATION_TO_CALLBACK:
            close = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            raise UserError(f"report_to={name} is not a tracker that transformers supports. {hint}")
        if name not in available:
            package = _PACKAGES.get(name, name)
            logger.warning("report_to=%s: not installed, so nothing is sent to it (pip install %s).", name, package)
            continue
        usable.append(name)
        if name == "wandb" and "WANDB_MODE" not in os.environ and not _has_wandb_key():
            os.environ["WANDB_MODE"] = "offline"
            logger.warning(
                "report_to=wandb: no API key (WANDB_API_KEY or `wandb login`), so it logs offline into ./wandb; "
                "`wandb sync` uploads it later."
            )
        if name == "comet_ml" and "COMET_START_ONLINE" not in os.environ and not _has_comet_key():
            os.environ["COMET_START_ONLINE"] = "0"
            logger.warning("report_to=comet_ml: no API key (COMET_API_KEY), so it logs offline into local files.")
    return usable


@contextmanager
def tensorboard_folder(folder: Path) -> Iterator[None]:
    """Within this block transformers' TensorBoard callback is created with `folder`, unless the user has chosen one.

    Its default folder, named after host and time, would start a new curve on every resume.
    """
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _has_comet_key() -> bool:
    return bool(os.environ.get("COMET_API_KEY")) or _COMET_CONFIG.expanduser().is_file()
