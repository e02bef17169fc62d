"""Option `chat_template` -> the Jinja text that renders messages."""

import json
import os
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from orpo_dist.data.spelling import NOTHING, decoded
from orpo_dist.errors import BadRow, UserError

CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
        "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
TEMPLATE_KWARGS_COLUMN = "chat_template_kwargs"
# What apply_chat_template is called with by us: no variable of a template may take its place.
OWN_ARGUMENTS = frozenset(
    {"conversation", "tools", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"}
    | {"return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length"}
)
ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


def resolve_chat_template(
    chat_template: str | None, processing_class: ProcessingClass, tools: bool = False
) -> str | None:
    """The Jinja text of option `chat_template`: a name (chatml, zephyr, or one of the tokenizer's own where it has
    several), a file, the template itself, or, where it is not set, the one of the tokenizer or processor (None if it
    has none).

    tools: for rows with tools, which take the template `tool_use` of a tokenizer that has several, as transformers'
        `get_chat_template` does.

    Raises:
        UserError: a name or file that does not exist; several templates, none of which is `default`.
    """
    named = _named_templates(processing_class)
    if not chat_template or chat_template == "tokenizer":
        if len(named) > 1 and "default" not in named:
            raise UserError(
                f"The tokenizer has the chat templates {', '.join(sorted(named))}, and none of them is `default`. "
                "Choose one with chat_template=NAME."
            )
        return (named.get("tool_use") if tools else None) or next(iter(named.values()), None)
    if chat_template in named:
        return named[chat_template]
    if chat_template in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[chat_template]
    if "{" in chat_template:
        return chat_template
    if os.path.isfile(chat_template):
        return Path(chat_template).read_text(encoding="utf-8")
    raise UserError(
        f"chat_template={chat_template}: neither one of {', '.join([*CHAT_TEMPLATES, *filter(None, named)])}, nor a "
        "file, nor a Jinja template."
    )


def _named_templates(processing_class: ProcessingClass) -> dict[str, str]:
    """The templates of a tokenizer or processor by name, `default` first; the name of a single one is ""."""
    own = processing_class.chat_template
    if not own and isinstance(processing_class, ProcessorMixin):
        own = processing_class.tokenizer.chat_template
    if isinstance(own, dict):
        return dict(sorted(own.items(), key=lambda item: item[0] != "default"))
    return {"": own} if own else {}


def read_template_kwargs(value: Any, column: str | None) -> dict[str, Any]:
    """The variables that a row gives to its chat template: an object or its JSON text; empty where there are none.

    https://huggingface.co/docs/trl/dataset_formats: `chat_template_kwargs`, such as {"enable_thinking": false}.

    Raises:
        BadRow: something else, or a name that is an argument of apply_chat_template itself.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = None if value.strip() in NOTHING else json.loads(value)
        except ValueError as error:
            if (spelled := decoded(value)) is None:  # in Python's words, as pandas writes it to CSV
                raise BadRow("bad template arguments", column, f"not valid JSON ({error})") from None
            value = spelled
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        raise BadRow("bad template arguments", column, f"{value!r} is not an object with names and values")
    taken = sorted(OWN_ARGUMENTS & value.keys())
    if taken:
        raise BadRow("bad template arguments", column, f"{', '.join(taken)}: not a variable of the template")
    # Arrow gives every row the keys of all rows, with None for those it lacks.
    return {name: item for name, item in value.items() if item is not None}
