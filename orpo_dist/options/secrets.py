"""What a secret is, and how it is kept out of everything that is written, printed, uploaded or listed as a process.

A name marks a secret (`hub_token`, WANDB_API_KEY), or a value does (hf_..., a URL with a password). Options may be
mappings, lists, or JSON texts of them.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRIVATE_FLAGS = "ORPO_DIST_PRIVATE_FLAGS"  # a variable with flags, as a JSON list: only its own user can read it

_NAMES = (
    r"token$|(^|[_-])pat$|api_?keys?|access_?keys?|private_?key|^key$|secret|passw|passphrase|credential|authorization"
)
_OPTION_NAME = re.compile(_NAMES, re.IGNORECASE)
# Options and settings of tokenizers and processors that are tokens of text.
_TEXT_TOKEN = re.compile(r"(^|_)(pad|eos|bos|unk|sep|cls|mask|start|image|video|audio|vision|eot|eom)_token$", re.I)
_VARIABLE_NAME = re.compile(r"token|key|secret|passw|credential|auth", re.IGNORECASE)
_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\bapi_org_[A-Za-z0-9]{8,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bsk-[\w-]{16,}"
    r"|\bwandb_v\d_\w{20,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bxox[abprs]-[\w-]{10,}|\bBearer\s+\S{8,}"
)
_HEX_KEY = re.compile(r"[0-9a-f]{40}")  # W&B's keys; of an option it is the hash of a commit
_USERINFO = re.compile(r"(?<=://)[^/@\s\"']+@")
_QUERY = re.compile(
    r"(?<=[?&])((?:access_?|auth_?|private_?|x-amz-security-)?token|api_?key|key|sig|signature|secret|password"
    r"|x-amz-(?:signature|credential)|awsaccesskeyid)=[^&#\s\"']+&?",
    re.IGNORECASE,
)
_ASSIGNMENT = re.compile(r"\b(\w*(?:token|key|secret|passw\w*|credential\w*)\w*)=[^\s,;]+", re.IGNORECASE)


def without_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without secrets, at any depth of mappings, lists and JSON texts. URLs lose user, password and signature.

    Texts only: `add_eos_token` is a bool.
    """
    return {name: _clean(value) for name, value in options.items() if not _is_secret(str(name), value)}


def secrets_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `without_secrets` leaves out or changes, whole."""
    clean = without_secrets(options)
    return {name: value for name, value in options.items() if name not in clean or clean[name] != value}


def without_password(text: str) -> str:
    """A text whose URLs have no user, password or signature."""
    return _QUERY.sub("", _USERINFO.sub("", text)).rstrip("?&") if "://" in text else text


def public_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables whose name and value do not look like a credential (`HF_TOKEN`, a URL with a password)."""
    return {
        name: value
        for name, value in environment.items()
        if not _VARIABLE_NAME.search(name)
        and not _VALUE.search(value)
        and not _HEX_KEY.fullmatch(value)
        and without_password(value) == value
    }


def holds_secret(text: str) -> bool:
    """Whether a text that is no option (of sbatch, a line of a sweep) seems to hold a credential."""
    return bool(_VALUE.search(text) or _ASSIGNMENT.search(text)) or without_password(text) != text


def split_flags(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--field value ...` as the flags that may be seen, and those that hold secrets."""
    public: list[str] = []
    private: list[str] = []
    position = 0
    while position < len(flags):
        flag, following = flags[position], flags[position + 1 : position + 2]
        name, equals, value = flag.partition("=")
        words = [flag]
        if flag.startswith("--") and not equals and following and not following[0].startswith("--"):
            words, value = [flag, following[0]], following[0]
        option = name.removeprefix("--").replace("-", "_")
        hidden = flag.startswith("--") and value != "" and bool(secrets_of({option: value}))
        (private if hidden else public).extend(words)
        position += len(words)
    return public, private


def with_private_flags(flags: Sequence[str]) -> list[str]:
    """The flags, and those that `PRIVATE_FLAGS` holds. The variable is removed: children have no use for it."""
    text = os.environ.pop(PRIVATE_FLAGS, None)
    return [*flags, *(json.loads(text) if text else [])]


def private_environment(private: Sequence[str]) -> dict[str, str]:
    """The variable that hands flags on to processes that are started."""
    known = json.loads(os.environ.get(PRIVATE_FLAGS, "[]"))
    return {PRIVATE_FLAGS: json.dumps([*known, *private])} if private else {}


def hide_own_flags() -> None:
    """Start this program again without the flags that hold secrets: everyone on a machine can list its processes, with
    their command lines. The process stays the same to its launcher; its flags arrive in the environment."""
    arguments = sys.argv[1:]
    public, private = split_flags(arguments)
    if not private or sys.orig_argv[len(sys.orig_argv) - len(arguments) :] != arguments:
        return
    start = [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]]
    os.execve(sys.executable, [*start, *public], {**os.environ, **private_environment(private)})


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, also while it is written."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _is_secret(name: str, value: Any) -> bool:
    if _OPTION_NAME.search(name) and not _TEXT_TOKEN.search(name):
        texts = value if isinstance(value, list | tuple) else value.values() if isinstance(value, Mapping) else [value]
        return any(isinstance(text, str) for text in texts)
    return isinstance(value, str) and _VALUE.search(value) is not None and not _structured(value)


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, list | tuple):
        return type(value)(_clean(item) for item in value if not (isinstance(item, str) and _is_secret("", item)))
    if isinstance(value, str):
        content = _structured(value)
        if content is not None and _clean(content) != content:
            return json.dumps(_clean(content))
        return without_password(value)
    return value


def _structured(text: str) -> Any:
    """The mapping or list that a text holds as JSON, else None."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
