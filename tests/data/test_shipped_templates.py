"""All text templates that trl ships, with conversations of every shape: what becomes of each, as a table."""

import os
import re
from pathlib import Path

import pytest
import trl
from packaging.version import Version

from orpo_dist.data.pairs import common_length
from orpo_dist.data.tokenize import PairTokenizer, TokenizedPair
from orpo_dist.options.data import PrepareOptions
from tests.data.conversations import FORMAT, SHAPES, outcome, shipped_templates, tokenizer_for

PINNED = re.search(r"^trl==(\S+)$", (Path(__file__).parents[2] / "constraints.txt").read_text("utf-8"), re.MULTILINE)
TABLE = Path(__file__).parent / "template_outcomes.txt"
TEMPLATES = shipped_templates()


def rows() -> list[str]:
    head = f"{'template':34}" + "".join(f"{shape:11}" for shape in SHAPES)
    lines = [
        f"{name:34}" + "".join(f"{outcome(text, pair):11}" for pair in SHAPES.values())
        for name, text in TEMPLATES.items()
    ]
    return [line.rstrip() for line in (head, *lines)]


def test_the_table():
    if os.environ.get("ORPO_DIST_UPDATE_GOLDEN"):
        TABLE.write_text("".join(f"{row}\n" for row in rows()))
    known = {line.split()[0]: line for line in TABLE.read_text("utf-8").splitlines()}
    found = [row for row in rows() if row.split()[0] in known]  # another release of trl ships other templates
    equal = [row for row in found if row == known[row.split()[0]]]
    tested = Version(trl.__version__) == Version(PINNED[1])
    assert len(found) > 20 and (found == equal if tested else len(equal) > 0.8 * len(found))


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_kept_is_what_apply_chat_template_writes(name):
    tokenizer = tokenizer_for(TEMPLATES[name])
    tokenize = PairTokenizer(tokenizer, FORMAT, PrepareOptions(max_length=None))
    for shape, pair in SHAPES.items():
        (result,) = tokenize([pair])
        if not isinstance(result, TokenizedPair):
            continue
        text = tokenizer.apply_chat_template(pair.prompt + pair.chosen, tools=pair.tools, tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert result.prompt_ids + result.chosen_ids == whole, shape
        header = tokenizer.apply_chat_template(
            pair.prompt, tools=pair.tools, tokenize=False, add_generation_prompt=True
        )
        asked = tokenizer(header, add_special_tokens=False)["input_ids"]
        assert common_length(asked, result.prompt_ids) == len(result.prompt_ids), shape


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("shape", ["turns", "tool turn"])
def test_what_the_model_did_not_write_is_not_scored(name, shape):
    tokenizer = tokenizer_for(TEMPLATES[name])
    (result,) = PairTokenizer(tokenizer, FORMAT, PrepareOptions(max_length=None))([SHAPES[shape]])
    if not isinstance(result, TokenizedPair):
        pytest.skip("a bad row, see the table")
    (start, stop), ids = result.chosen_context, result.chosen_ids
    context, scored = tokenizer.decode(ids[start:stop]), tokenizer.decode(ids[:start]) + tokenizer.decode(ids[stop:])
    others, answers = {
        "turns": (["How now"], ["General Kenobi", "Brown cow"]),
        "tool turn": (["22 degrees"], ["get_weather", "ris", "It is 22 degrees warm"]),
    }[shape]
    assert all(text in context for text in others) and not any(text in context for text in answers[1:])
    assert all(text in scored for text in answers) and "How now" not in scored
    assert result.rejected_context == []
