"""Removes credentials from options and variables before they are written to a run's folder."""

import re
from typing import Any

_OPTION_NAME = re.compile(r"token$|api_?key|secret|passw|credential", re.IGNORECASE)
_VARIABLE_NAME = re.compile(r"token|key|secret|passw|credential|auth", re.IGNORECASE)
_VALUE = re.compile(r"^hf_[A-Za-z0-9]{8,}$|^[0-9a-f]{40}$|://[^/@\s]+:[^/@\s]+@")


def without_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """A copy without the strings, at any depth, whose name marks a credential (`hub_token`, `api_key`).

    Strings only: `add_eos_token` is a bool.
    """
    clean = {}
    for name, value in options.items():
        if isinstance(value, str) and _OPTION_NAME.search(str(name)):
            continue
        clean[name] = without_secrets(value) if isinstance(value, dict) else value
    return clean


def public_environment(environment: dict[str, str]) -> dict[str, str]:
    """The variables whose name and value do not look like a credential (`HF_TOKEN`, a URL with a password)."""
    return {
        name: value
        for name, value in environment.items()
        if not _VARIABLE_NAME.search(name) and not _VALUE.search(value)
    }
