"""Any conversation through any template: text in is text out, and the tokens are those of apply_chat_template."""

import json
import re

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from orpo_dist.data.chat_template import CHAT_TEMPLATES  # noqa: E402
from orpo_dist.data.pairs import Pair, common_length  # noqa: E402
from orpo_dist.data.tokenize import PairTokenizer  # noqa: E402
from orpo_dist.errors import BadRow  # noqa: E402
from orpo_dist.options.data import PrepareOptions  # noqa: E402
from tests.data.conversations import FORMAT, TOOLS, assistant, shipped_templates, tokenizer_for, user  # noqa: E402

NAMES = (
    "qwen2_5",
    "qwen3",
    "llama3_1",
    "gemma3",
    "gemma4",
    "phi3",
    "deepseek_r1_distill",
    "gptoss",
    "glm4moe",
    "cohere",
)
TEMPLATES = {**CHAT_TEMPLATES, **{name: text for name, text in shipped_templates().items() if name in NAMES}}
# Templates cut thoughts out and read marks: those have tests of their own.
TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<>[]|\uff5c"), min_size=1, max_size=20
).filter(lambda text: text.strip() and "/think" not in text and "/no_think" not in text)
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "days", "at"]), TEXT | st.integers(0, 10**6), min_size=1)


@st.composite
def pairs(draw) -> Pair:
    prompt = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [user(draw(TEXT)), assistant(draw(TEXT))]
    prompt.append(user(draw(TEXT)))
    tools = None
    if draw(st.integers(0, 3)) == 0:
        tools = TOOLS
        call = {"id": "call12345", "type": "function",
                "function": {"name": "get_weather", "arguments": draw(ARGUMENTS)}}  # fmt: skip
        result = {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": draw(TEXT)}
        prompt += [assistant("", tool_calls=[call]), result]
    sides = []
    for _ in range(2):
        side = [assistant(draw(TEXT))]
        if draw(st.integers(0, 3)) == 0:
            side += [user(draw(TEXT)), assistant(draw(TEXT))]
        sides.append(side)
    return Pair(prompt, sides[0], sides[1], tools)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def holds(text: str, wanted: str) -> bool:
    spellings = (wanted, json.dumps(wanted, ensure_ascii=False)[1:-1], json.dumps(wanted)[1:-1])
    return any(squeezed(spelling) in squeezed(text) for spelling in spellings)


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(TEMPLATES)), pairs())
def test_text_in_is_text_out(name, pair):
    tokenizer = tokenizer_for(TEMPLATES[name])
    (result,) = PairTokenizer(tokenizer, FORMAT, PrepareOptions(max_length=None))([pair])
    if isinstance(result, BadRow):
        told = {"dropped by the template", "chat template", "identical pair"}
        assert result.kind in told, result
        if pair.tools is None:  # what these templates have no place for, and two answers of the same tokens
            assert result.kind != "dropped by the template" and (
                result.kind == "identical pair" or pair.prompt[0]["role"] == "system"
            ), result
        return
    asked = tokenizer.apply_chat_template(pair.prompt, tools=pair.tools, tokenize=False, add_generation_prompt=True)
    asked_ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert common_length(asked_ids, result.prompt_ids) == len(result.prompt_ids)
    for side, ids, context in (
        (pair.chosen, result.chosen_ids, result.chosen_context),
        (pair.rejected, result.rejected_ids, result.rejected_context),
    ):
        text = tokenizer.apply_chat_template(pair.prompt + side, tools=pair.tools, tokenize=False)
        assert result.prompt_ids + ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        written = tokenizer.decode(result.prompt_ids + ids, clean_up_tokenization_spaces=False)
        assert all(holds(written, message["content"]) for message in pair.prompt + side)
        assert len(context) == 2 * (len(side) > 1)
        if context:
            start, stop = context
            others = tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)
            first, last = (
                tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids[:start], ids[stop:])
            )
            assert holds(others, side[1]["content"])
            assert holds(first, side[0]["content"]) and holds(last, side[2]["content"])
