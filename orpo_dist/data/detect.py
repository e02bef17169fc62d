"""Column names and the first rows -> where the pair lies in a row."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from orpo_dist.data.media_columns import find_media
from orpo_dist.data.messages import decode, read_content
from orpo_dist.data.pairs import SWIFT_CHOSEN, SWIFT_REJECTED, PairFormat
from orpo_dist.data.place_images import has_images
from orpo_dist.errors import BadRow, UserError
from orpo_dist.images.source import ImageSource
from orpo_dist.options.data import PrepareOptions

PROMPT_COLUMNS = ("prompt", "conversations", "conversation")
# Columns that hold the prompt in public data sets under names too general to be taken without being asked.
LIKELY_PROMPT_COLUMNS = ("question", "instruction", "input", "query", "messages", "context")
SAMPLE = 200  # rows looked at to detect the format


def detect_format(columns: Sequence[str], sample: Sequence[dict[str, Any]], options: PrepareOptions) -> PairFormat:
    """Finds the columns and the format from the column names and the first rows.

    Raises:
        UserError: no column for chosen or rejected, a named column that is not there, a format that contradicts
            `apply_chat_template`, or text completions without a prompt column where another column may be meant.
    """
    swift = SWIFT_CHOSEN in columns and "chosen" not in columns and any(name in columns for name in SWIFT_REJECTED)
    names = ((SWIFT_CHOSEN,), SWIFT_REJECTED) if swift else (("chosen",), ("rejected",))
    chosen = _column(columns, "chosen", options.chosen_column, names[0], required=True)
    rejected = _column(columns, "rejected", options.rejected_column, names[1], required=True)
    assert chosen is not None and rejected is not None
    if chosen == rejected:
        raise UserError(f"chosen_column and rejected_column are both `{chosen}`: a pair needs two columns.")
    prompt = _column(columns, "prompt", options.prompt_column, PROMPT_COLUMNS)
    system = _column(columns, "system", options.system_column, ("system",))
    tools = _column(columns, "tools", options.tools_column, ("tools",))
    media = find_media(columns, sample, options.image_column, (prompt, chosen, rejected, system, tools))
    image = media.image
    illustrated = image != "" and any(_has_image(row, image, prompt, chosen) for row in sample)

    styles = Counter(_style(row, prompt, chosen) for row in sample).most_common()
    style = next((name for name, _ in styles if name != "unreadable"), "text")
    if style == "text" and prompt is None:
        likely = [name for name in LIKELY_PROMPT_COLUMNS if name in columns]
        if likely and options.prompt_column is None:
            raise UserError(
                f"No prompt column among {_list(columns)}. If `{likely[0]}` holds the prompt, set "
                f"prompt_column={likely[0]}; if the completions contain it, set prompt_column=''."
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
    repeats = style == "text" and prompt is not None and _repeats_prompt(sample, prompt, chosen, rejected)
    parts = [{"text": "text", "messages": "messages", "sharegpt": "ShareGPT messages"}[style]]
    parts.insert(0, f"prompt in `{prompt}`" if prompt else "implicit prompt (the common beginning)")
    parts.append(f"`{chosen}` over `{rejected}`")
    if repeats:
        parts.append("the completions repeat the prompt, it is taken off")
    others = (("system message", system), ("tools", tools), ("images", image if illustrated else None))
    parts += [f"{role} in `{name}`" for role, name in others if name]
    if illustrated and image is None:
        parts.append("images in the messages")
    parts += [f"not read: `{name}`, which looks like images" for name in media.lookalikes]
    if style == "text":
        parts.append("chat template applied" if options.apply_chat_template else "no chat template")
    return PairFormat(
        description=", ".join(parts),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        system=system,
        tools=tools,
        repeats_prompt=repeats,
        apply_chat_template=options.apply_chat_template,
        image=image,
        media=media,
        image_source=ImageSource(options.image_folder, options.allow_image_urls, options.allow_outside_image_folder),
        has_images=illustrated,
    )


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


def _style(row: dict[str, Any], prompt: str | None, chosen: str) -> str:
    """How a row spells its messages: "sharegpt", "messages", "text" or "unreadable"."""
    try:
        values = [read_content(decode(row[name]), name) for name in (prompt, chosen) if name is not None]
    except BadRow:
        return "unreadable"
    if all(isinstance(value, str) for value in values):
        return "text"
    raw = [decode(row[name]) for name in (prompt, chosen) if name is not None]
    first = [value[0] if isinstance(value, list) and value else value for value in raw]
    return "sharegpt" if any(isinstance(value, dict) and value.get("from") for value in first) else "messages"


def _has_image(row: dict[str, Any], image: str | None, prompt: str | None, chosen: str) -> bool:
    if image and decode(row[image]) not in (None, "", []):
        return True
    for name in (prompt, chosen):
        try:
            if name is not None and has_images(read_content(decode(row[name]), name)):
                return True
        except BadRow:
            continue
    return False


def _repeats_prompt(sample: Sequence[dict[str, Any]], prompt: str, chosen: str, rejected: str) -> bool:
    """Whether every readable row of the sample starts both completions with a prompt that has some text."""
    seen = False
    for row in sample:
        values = [decode(row[name]) for name in (prompt, chosen, rejected)]
        if not all(isinstance(value, str) for value in values) or not values[0].strip():
            continue
        if not (values[1].startswith(values[0]) and values[2].startswith(values[0])):
            return False
        seen = True
    return seen


def _list(columns: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in columns if not name.startswith("_")) or "none"
