"""Option `chat_template` -> the Jinja text that renders messages."""

import os
from pathlib import Path
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from orpo_dist.errors import UserError

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
ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


def resolve_chat_template(chat_template: str | None, processing_class: ProcessingClass) -> str | None:
    """The Jinja text of option `chat_template`: a name (chatml, zephyr), a file, the template itself, or, where it is
    not set, the one of the tokenizer or processor (None if it has none).

    Raises:
        UserError: a name or file that does not exist.
    """
    if not chat_template or chat_template == "tokenizer":
        if isinstance(processing_class, ProcessorMixin):
            own = processing_class.chat_template or processing_class.tokenizer.chat_template
            return own.get("default") if isinstance(own, dict) else own
        own = processing_class.chat_template
        # A tokenizer may carry several by name; transformers knows which of them suits tools.
        return processing_class.get_chat_template() if isinstance(own, dict) else own
    if chat_template in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[chat_template]
    if "{" in chat_template:
        return chat_template
    if os.path.isfile(chat_template):
        return Path(chat_template).read_text(encoding="utf-8")
    raise UserError(
        f"chat_template={chat_template}: neither one of {', '.join(CHAT_TEMPLATES)}, nor a file, nor a Jinja template."
    )
