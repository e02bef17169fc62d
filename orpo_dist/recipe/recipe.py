"""A recipe: data, model and training options, from a YAML file, flags or both, with TRL's names."""

import difflib
import os
import re
from argparse import Action, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

import yaml

from orpo_dist.errors import UserError, raised_in
from orpo_dist.options.data import DataArguments
from orpo_dist.recipe.file import read_recipe_file
from orpo_dist.recipe.secrets import public_environment, without_secrets

# transformers and the hub client read HF_HOME, HF_HUB_OFFLINE and other variables on import. A recipe may set them in
# its `env:` section, so nothing here imports these libraries before the file has been read.
if TYPE_CHECKING:
    from orpo_dist.config import ORPOConfig
    from orpo_dist.options.model import ModelArguments

# Names of fields in other trainers and in older versions of transformers.
OTHER_NAMES = {
    "alpha": "beta",
    "batch_size": "per_device_train_batch_size",
    "cutoff_len": "max_length",
    "dataset": "dataset_name",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lambda": "beta",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "model": "model_name_or_path",
    "revision": "model_revision",
}
# Set by the config itself, or of no use for repeating a run.
_NOT_SAVED = {
    "accelerator_config",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "debug",
    "disable_tqdm",
    "do_eval",
    "include_num_input_tokens_seen",
    "local_rank",
    "remove_unused_columns",
}
# transformers' fields that shape every run: saved even if they have their default.
_ALWAYS_SAVED = {
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "fp16",
    "eval_strategy",
    "save_strategy",
    "save_steps",
    "seed",
}
# Modules that check options and name them in their errors. The same error types raised elsewhere (torch, a process
# group, this package) are not about an option.
_OPTION_CHECKS = (
    "accelerate.parallelism_config",
    "accelerate.state",
    "accelerate.utils.dataclasses",
    "accelerate.utils.deepspeed",
    "transformers.hf_argparser",
    "transformers.integrations",
    "transformers.trainer_pt_utils",
    "transformers.training_args",
    "transformers.utils.generic",
    "trl.scripts",
)
_FLAG_OF_DTYPE = re.compile(r"^--torch[-_]dtype(?==|$)")
_KINDS = {"float": "a number", "int": "a whole number", "string_to_bool": "true or false"}


@dataclass
class Recipe:
    """All options of one run.

    Attributes:
        environment: variables of the `env:` section, which are already set.
    """

    data: DataArguments
    model: "ModelArguments"
    training: "ORPOConfig"
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, argv: Sequence[str]) -> "Recipe":
        """From command-line arguments: `RECIPE.yaml --field value ...`, `--config RECIPE.yaml ...` or only flags.

        Flags override the file. Variables of the file's `env:` section are set before any library reads them.

        Raises:
            UserError: unknown names (with the closest known one), wrong types, contradicting options.
            SystemExit: 0 after `--help`.
        """
        path, flags = _split_off_recipe(list(argv))
        file = read_recipe_file(path) if path is not None else None
        if file is None:
            return cls._build({}, flags, lambda name: "the command line", "orpo")
        os.environ.update(file.environment)
        recipe = cls._build(file.values, flags, file.where, file.path.stem)
        recipe.environment = file.environment
        return recipe

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Recipe":
        """From a flat mapping with the same names as in a file, without `env`. Raises UserError as `parse` does."""
        return cls._build(mapping, [], lambda name: "the recipe", "orpo")

    @classmethod
    def _build(
        cls, values: Mapping[str, Any], flags: list[str], where: Callable[[str], str], run_name: str
    ) -> "Recipe":
        from orpo_dist.config import ORPOConfig
        from orpo_dist.options.model import ModelArguments

        values, where = _with_dtype(dict(values), where)
        flags = [_FLAG_OF_DTYPE.sub("--dtype", flag) for flag in flags]
        parser = _parser((DataArguments, ModelArguments, ORPOConfig))
        hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
        names = [option.name for kind in parser.dataclass_types for option in fields(kind) if option.init]
        for name in values:
            if name not in names:
                raise UserError(f"{where(name)}: unknown field `{name}`. {_suggestion(name, names)}")
        defaults = {
            name: _checked(name, value, hints[name], parser._option_string_actions[f"--{name}"], where(name))
            for name, value in values.items()
        }
        parser.set_defaults_with_config(**{"output_dir": f"runs/{run_name}", **defaults})
        try:
            data, model, training, rest = parser.parse_args_into_dataclasses(
                args=flags, return_remaining_strings=True, look_for_args_file=False
            )
        except UserError:
            raise
        except (ValueError, TypeError, ImportError) as error:
            if not raised_in(error).startswith(_OPTION_CHECKS):
                raise
            raise UserError(str(error)) from error
        _refuse_rest(rest, names)
        recipe = cls(data, model, training)
        recipe._require("dataset_name", data.dataset_name, "a file of preference pairs or a dataset on the hub")
        recipe._require("model_name_or_path", model.model_name_or_path, "a model on the hub or its folder")
        return recipe

    @staticmethod
    def _require(name: str, value: Any, what: str) -> None:
        if not value:
            raise UserError(f"{name} is missing: set it to {what}, in the recipe or as --{name}.")

    def to_mapping(self) -> dict[str, Any]:
        """A flat mapping that repeats this run, without credentials: every data and model field that is set, the
        training fields of this project and TRL, and every other training field that differs from its default."""
        from orpo_dist.config import OWN_OPTIONS

        always = _ALWAYS_SAVED | OWN_OPTIONS
        mapping: dict[str, Any] = {}
        for part in (self.data, self.model, self.training):
            for option in fields(part):
                value = _plain(getattr(part, option.name))
                default = option.default_factory() if option.default_factory is not MISSING else option.default
                wanted = part is not self.training or option.name in always
                if option.name in _NOT_SAVED or not option.init:
                    continue
                if value != _plain(default) or (wanted and value is not None):
                    mapping[option.name] = value
        mapping["report_to"] = mapping.get("report_to") or "none"
        return without_secrets(mapping)

    def text(self) -> str:
        """YAML of the recipe, without credentials. `orpo-dist train` with it repeats the run."""
        mapping = self.to_mapping()
        environment = public_environment(self.environment)
        if environment:
            mapping = {"env": environment, **mapping}
        text = yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True, width=120)
        return f"# Resolved recipe of a run; `orpo-dist train` with this file repeats it.\n{text}"

    def save(self, path: str | Path) -> None:
        """Write `text` into a file."""
        Path(path).write_text(self.text(), "utf-8")


def _with_dtype(values: dict[str, Any], where: Callable[[str], str]) -> tuple[dict[str, Any], Callable[[str], str]]:
    """`torch_dtype`, which `dtype` was once called, under its name of today; and where each name stands."""
    if "torch_dtype" not in values:
        return values, where
    if values.get("dtype", values["torch_dtype"]) != values["torch_dtype"]:
        raise UserError(f"{where('torch_dtype')}: `torch_dtype` and `dtype` are the same option: keep one.")
    values["dtype"] = str(values.pop("torch_dtype")).removeprefix("torch.")
    return values, lambda name: where("torch_dtype" if name == "dtype" else name)


def _split_off_recipe(argv: list[str]) -> tuple[str | None, list[str]]:
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    for position, argument in enumerate(argv):
        if argument == "--config":
            if position + 1 == len(argv):
                raise UserError("--config needs the path of a recipe.")
            return argv[position + 1], argv[:position] + argv[position + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), argv[:position] + argv[position + 1 :]
    return None, argv


def _parser(dataclass_types: Any) -> Any:
    from trl import TrlParser

    class RecipeParser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(_readable(message))

    return RecipeParser(dataclass_types, usage="orpo-dist train [RECIPE.yaml] [--field value ...]", allow_abbrev=False)


def _readable(message: str) -> str:
    """Rewords argparse's message about a wrong type."""
    wrong_type = re.fullmatch(r"argument (--\w+)\S*: invalid (\w+) value: (.*)", message)
    if wrong_type:
        option, kind, value = wrong_type.groups()
        return f"{option}: {value} is not {_KINDS.get(kind, f'a valid {kind}')}."
    return re.sub(r"^argument (--\w+)/\S+:", r"\1:", message).rstrip(".") + "."


def _refuse_rest(rest: list[str], names: list[str]) -> None:
    for argument in rest:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0].replace("-", "_")
            raise UserError(f"Unknown option {argument.split('=')[0]}. {_suggestion(name, names, '--')}")
    if rest:
        hint = " A recipe comes first: orpo-dist train RECIPE.yaml --field value." if rest[0].endswith("ml") else ""
        raise UserError(f"{rest[0]!r} does not belong to an option.{hint}")


def _suggestion(name: str, names: list[str], prefix: str = "") -> str:
    if name == "warmup_ratio":
        return f"Use {prefix}warmup_steps: a value below 1 is a share of all steps."
    known = OTHER_NAMES.get(name)
    close = [known] if known else difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{prefix}{close[0]}`?"
    return "docs/config.md lists this project's fields; all others are fields of transformers' TrainingArguments."


def _checked(name: str, value: Any, hint: Any, action: Action, where: str) -> Any:
    """The value as the field's type. argparse converts and checks strings only; a file also has numbers and lists."""
    allowed = _members(hint)
    complaint = f"{where}: `{name}`"
    if value is None:
        if type(None) not in allowed:
            raise UserError(f"{complaint} has no value. Remove the line, or give it one.")
        return None
    if isinstance(value, dict | list):
        kind = type(value)
        if not any((get_origin(member) or member) is kind for member in allowed):
            raise UserError(f"{complaint} takes one value, not a {'mapping' if kind is dict else 'list'}.")
        return [_scalar(item, allowed, action, complaint) for item in value] if kind is list else value
    return _scalar(value, allowed, action, complaint)


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint: `int | None` gives (int, NoneType)."""
    origin = get_origin(hint)
    return (hint,) if origin is None or origin in (dict, list) else get_args(hint)


def _scalar(value: Any, allowed: tuple[Any, ...], action: Action, complaint: str) -> Any:
    if isinstance(value, bool) and bool not in allowed:
        if any(get_args(member) == (value,) for member in allowed):  # Literal[False]
            return value
        value = "no" if value is False and "no" in _words(allowed) else str(value).lower()
    convert = action.type
    try:
        converted = convert(str(value)) if callable(convert) else value
    except (ValueError, TypeError, ArgumentTypeError) as error:
        kinds = [member.__name__ for member in allowed if member in (int, float)]
        what = _KINDS["string_to_bool"] if bool in allowed else _KINDS[kinds[0]] if kinds else "of the right type"
        raise UserError(f"{complaint} is {value!r}, which is not {what}.") from error
    if action.choices is not None and converted not in action.choices:
        raise UserError(f"{complaint} is {value!r}, which is not one of {', '.join(map(str, action.choices))}.")
    return converted


def _words(allowed: tuple[Any, ...]) -> set[str]:
    """Values of the enumerations in a hint. If `no` is one of them, false means `no`: YAML reads `no` as false."""
    kinds = [member for member in allowed if isinstance(member, type) and issubclass(member, Enum)]
    return {word.value for kind in kinds for word in kind}


def _plain(value: Any) -> Any:
    """The value in YAML and JSON types."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # YAML cannot represent its subclasses
    return value if isinstance(value, str | float | bool | type(None)) else str(value)
