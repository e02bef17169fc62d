"""Column names and the first rows -> where the pair lies in a row."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from orpo_dist.data.chat_template import TEMPLATE_KWARGS_COLUMN
from orpo_dist.data.media_columns import find_media
from orpo_dist.data.messages import decode, decode_optional, read_content
from orpo_dist.data.pairs import SWIFT_CHOSEN, SWIFT_REJECTED, PairFormat
from orpo_dist.data.place_images import has_images
from orpo_dist.data.prompt_text import repeats
from orpo_dist.data.spelling import Strings, strings_of
from orpo_dist.data.spelling import decoded as spelt
from orpo_dist.errors import BadRow, UserError
from orpo_dist.images.source import ImageSource
from orpo_dist.options.data import PrepareOptions

PROMPT_COLUMNS = ("prompt", "conversations", "conversation")
# Columns that hold the prompt in public data sets under names too general to be taken without being asked.
LIKELY_PROMPT_COLUMNS = ("question", "instruction", "input", "query", "messages", "context")
# Alpaca's columns in LLaMA-Factory: https://llamafactory.readthedocs.io/en/latest/getting_started/data_preparation.html
JOINED, HISTORY = ("instruction", "input"), "history"
# Columns of public data sets that say something to the model, and are read only where an option names them.
TELLING = {"systemprompt", "systemmessage", "systeminstruction", "functions", "availabletools", "toolschemas"}
TELLING |= {"documents", "context", "chathistory"}
SAMPLE = 200  # rows looked at to detect the format


def detect_format(columns: Sequence[str], sample: Sequence[dict[str, Any]], options: PrepareOptions) -> PairFormat:
    """Finds the columns and the format from the column names and the first rows.

    Raises:
        UserError: no column for chosen or rejected, a named column that is not there, a format that contradicts
            `apply_chat_template`, or text completions without a prompt column where another column may be meant.
    """
    prompt, chosen, rejected = _pair_columns(columns, options)
    system = _column(columns, "system", options.system_column, ("system",))
    tools = _column(columns, "tools", options.tools_column, ("tools",))
    media = find_media(columns, sample, options.image_column, (prompt, chosen, rejected, system, tools))
    illustrated = media.image != "" and any(_has_image(row, media.image, prompt, chosen) for row in sample)
    strings = column_strings(sample, prompt, chosen, rejected)
    style = _common_style(sample, prompt, chosen, strings)
    _check_style(columns, prompt, chosen, style, options)
    joined = JOINED if prompt in JOINED and set(JOINED) <= set(columns) else ()
    found = PairFormat(
        description="",
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        system=system,
        tools=tools,
        repeats_prompt=style == "text" and prompt is not None and _repeats_prompt(sample, prompt, chosen, rejected),
        apply_chat_template=options.apply_chat_template,
        image=media.image,
        media=media,
        image_source=ImageSource(options.image_folder, options.allow_image_urls, options.allow_outside_image_folder),
        has_images=illustrated,
        strings=strings,
        joined=joined,
        history=HISTORY if prompt not in (None, HISTORY) and HISTORY in columns else None,
        template_kwargs=TEMPLATE_KWARGS_COLUMN if TEMPLATE_KWARGS_COLUMN in columns else None,
    )
    unread = [name for name in columns if name not in found.columns and name.lower().replace("_", "") in TELLING]
    noted = "".join(f", not read: `{name}`" for name in unread)
    return replace(found, description=_describe(found, style) + noted)


def column_strings(
    sample: Sequence[dict[str, Any]], prompt: str | None, chosen: str, rejected: str
) -> dict[str, Strings]:
    """What the strings of each column of the pair are. One of the two answers alone does not spell messages: the other
    would be text, which only ms-swift's `rejected_response` is."""
    names = [name for name in (prompt, chosen, rejected) if name is not None]
    strings = {name: strings_of(decode(row.get(name)) for row in sample) for name in names}
    if rejected in SWIFT_REJECTED:
        return strings
    sides = {strings[chosen], strings[rejected]}
    return strings | {chosen: "text", rejected: "text"} if sides == {"text", "spelled"} else strings


def _pair_columns(columns: Sequence[str], options: PrepareOptions) -> tuple[str | None, str, str]:
    swift = SWIFT_CHOSEN in columns and "chosen" not in columns and any(name in columns for name in SWIFT_REJECTED)
    names = ((SWIFT_CHOSEN,), SWIFT_REJECTED) if swift else (("chosen",), ("rejected",))
    chosen = _column(columns, "chosen", options.chosen_column, names[0], required=True)
    rejected = _column(columns, "rejected", options.rejected_column, names[1], required=True)
    assert chosen is not None and rejected is not None
    if chosen == rejected:
        raise UserError(f"chosen_column and rejected_column are both `{chosen}`: a pair needs two columns.")
    return _column(columns, "prompt", options.prompt_column, PROMPT_COLUMNS), chosen, rejected


def _check_style(columns: Sequence[str], prompt: str | None, chosen: str, style: str, options: PrepareOptions) -> None:
    if style == "text" and prompt is None:
        likely = [name for name in LIKELY_PROMPT_COLUMNS if name in columns]
        if likely and options.prompt_column is None:
            joined = f" (`{JOINED[1]}` is joined to it)" if set(JOINED) <= {*columns, likely[0]} else ""
            raise UserError(
                f"No prompt column among {_list(columns)}. If `{likely[0]}` holds the prompt, set "
                f"prompt_column={likely[0]}{joined}; if the completions contain it, set prompt_column=''."
            )
        if options.apply_chat_template:
            raise UserError(
                "apply_chat_template=true needs to know where the prompt ends, and there is no prompt column among "
                f"{_list(columns)}. Name it with prompt_column, or leave apply_chat_template unset."
            )
    if style != "text" and options.apply_chat_template is False:
        raise UserError(
            f"`{chosen}` holds lists of messages, which only a chat template can render, and apply_chat_template is "
            "false. Leave it unset, or store text."
        )


def _describe(found: PairFormat, style: str) -> str:
    parts = [f"prompt in `{found.prompt}`" if found.prompt else "implicit prompt (the common beginning)"]
    if found.joined:
        parts = [f"prompt joined of {_list(found.joined)}"]
    parts += [{"text": "text", "messages": "messages", "sharegpt": "ShareGPT messages"}[style]]
    parts += [f"`{found.chosen}` over `{found.rejected}`"]
    spelled = [name for name, strings in found.strings.items() if strings == "spelled"]
    if spelled:
        parts.append(f"messages decoded from the text of {_list(spelled)}")
    if found.repeats_prompt:
        parts.append("the completions repeat the prompt, it is taken off")
    images = found.image if found.has_images else None
    others = (("system message", found.system), ("tools", found.tools), ("images", images), ("turns", found.history))
    parts += [f"{role} in `{name}`" for role, name in others if name]
    if found.template_kwargs:
        parts.append(f"template variables in `{found.template_kwargs}`")
    if found.has_images and found.image is None:
        parts.append("images in the messages")
    parts += [f"not read: `{name}`, which looks like images" for name in found.media.lookalikes]
    if style == "text":
        parts.append("chat template applied" if found.apply_chat_template else "no chat template")
    return ", ".join(parts)


def _column(
    columns: Sequence[str], what: str, given: str | None, names: Sequence[str], required: bool = False
) -> str | None:
    if given == "" and not required:
        return None
    if given:
        if given not in columns:
            raise UserError(f"{what}_column={given}: no such column. The columns are {_list(columns)}.")
        return given
    found = next((name for name in names if name in columns), None)
    if found is None and required:
        raise UserError(
            f"No column `{names[0]}`. The columns are {_list(columns)}. Name the right ones with prompt_column, "
            "chosen_column and rejected_column."
        )
    return found


def _common_style(
    sample: Sequence[dict[str, Any]], prompt: str | None, chosen: str, strings: dict[str, Strings]
) -> str:
    styles = Counter(_style(row, prompt, chosen, strings) for row in sample).most_common()
    return next((name for name, _ in styles if name != "unreadable"), "text")


def _style(row: dict[str, Any], prompt: str | None, chosen: str, strings: dict[str, Strings]) -> str:
    """How a row spells its messages: "sharegpt", "messages", "text" or "unreadable"."""
    names = [name for name in (prompt, chosen) if name is not None]
    try:
        values = [read_content(decode(row[name]), name, strings[name]) for name in names]
    except BadRow:
        return "unreadable"
    if all(isinstance(value, str) for value in values):
        return "text"
    raw = [decode(row[name]) for name in names]
    raw = [spelt(value) or value if isinstance(value, str) else value for value in raw]
    first = [value[0] if isinstance(value, list) and value else value for value in raw]
    return "sharegpt" if any(isinstance(value, dict) and value.get("from") for value in first) else "messages"


def _has_image(row: dict[str, Any], image: str | None, prompt: str | None, chosen: str) -> bool:
    if image and decode_optional(row[image]) not in (None, "", []):
        return True
    for name in (prompt, chosen):
        try:
            if name is not None and has_images(read_content(decode(row[name]), name)):
                return True
        except BadRow:
            continue
    return False


def _repeats_prompt(sample: Sequence[dict[str, Any]], prompt: str, chosen: str, rejected: str) -> bool:
    """Whether most readable rows of the sample start both completions with a prompt that has some text."""
    copies = []
    for row in sample:
        values = [decode(row[name]) for name in (prompt, chosen, rejected)]
        if all(isinstance(value, str) for value in values) and values[0].strip():
            copies.append(all(repeats(values[0], text) for text in values[1:]))
    return sum(copies) * 2 > len(copies)


def _list(columns: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in columns if not name.startswith("_")) or "none"
