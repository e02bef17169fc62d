"""Conversations of every shape that preference data has, and the chat templates that trl ships."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from orpo_dist.data.pairs import Pair, PairFormat
from orpo_dist.data.render_pair import PairRenderer
from orpo_dist.errors import BadRow
from orpo_dist.options.data import PrepareOptions
from tests.tiny_tokenizers import train_bpe

FORMAT = PairFormat("", "prompt", "chosen", "rejected", None, None, False, None)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


CALL = assistant(
    "", tool_calls=[{"id": "call12345", "type": "function",
                     "function": {"name": "get_weather", "arguments": {"city": 'Pa"ris', "days": 3}}}]
)  # fmt: skip
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "22 degrees"}
HELLO, KENOBI = user("Hello there"), assistant("General Kenobi")
OTHER = [assistant("Another reply")]
SHAPES = {
    "plain": Pair([HELLO], [KENOBI], OTHER),
    "system": Pair([{"role": "system", "content": "Be brief."}, HELLO], [KENOBI], OTHER),
    "several": Pair([HELLO, KENOBI, user("How now")], [assistant("Brown cow")], OTHER),
    "thought": Pair([HELLO], [assistant("<think>\nHe is bold.\n</think>\n\nGeneral Kenobi")], OTHER),
    "reasoning": Pair([HELLO], [assistant("General Kenobi", reasoning_content="He is bold.")], OTHER),
    "tools": Pair([user("Weather?")], [assistant("Where?")], OTHER, TOOLS),
    "call": Pair([user("Weather?")], [CALL], OTHER, TOOLS),
    "result": Pair([user("Weather?"), CALL, RESULT], [assistant("It is 22 degrees warm")], OTHER, TOOLS),
    "turns": Pair([HELLO], [KENOBI, user("How now"), assistant("Brown cow")], OTHER),
    "tool turn": Pair([user("Weather?")], [CALL, RESULT, assistant("It is 22 degrees warm")], OTHER, TOOLS),
}


def shipped_templates() -> dict[str, str]:
    """The text templates of the installed trl by name. Those of llava and idefics take parts, which a processor
    spells."""
    spec = find_spec("trl")
    folder = Path(str(spec.origin)).parent / "chat_templates" if spec else Path("none")
    parts = ("llava", "idefics", "smolvlm")
    return {p.stem: p.read_text("utf-8") for p in sorted(folder.glob("*.jinja")) if not p.name.startswith(parts)}


@cache
def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the marks in `template` as its own tokens, as the template's model does."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(["<pad>", "<s>", "</s>"]), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    marks = dict.fromkeys(re.findall(r"<[|\uff5c][^<>\s'\"{}]+[|\uff5c]>|</?[a-z_]+>|\[/?[A-Z_]+\]", template))
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in marks])
    tokenizer.chat_template = template
    return tokenizer


def outcome(template: str, pair: Pair, **options) -> str:
    """What becomes of a pair: "kept", "note", "drops", "refuses" or "boundary"."""
    kinds = {"dropped by the template": "drops", "chat template": "refuses", "template without a boundary": "boundary"}
    try:
        rendered = PairRenderer(tokenizer_for(template), FORMAT, PrepareOptions(**options)).render(pair)
    except BadRow as bad:
        return kinds[bad.kind]
    return "note" if rendered.notes else "kept"
