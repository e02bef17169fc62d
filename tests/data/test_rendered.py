"""Text that went through a chat template before, and text that only mentions one."""

import copy

import pytest

from orpo_dist.data.pairs import Pair, PairFormat
from orpo_dist.data.rendered import RenderedMarkers
from orpo_dist.data.tokenize import PairTokenizer
from orpo_dist.errors import BadRow
from orpo_dist.options.data import PrepareOptions


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("[INST] Hi [/INST]", "[INST]"),
        ("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]", "[INST]"),
        ("<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>"),
        ("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>", "<|start_header_id|>"),
        ("<start_of_turn>user\nHi<end_of_turn>", "<start_of_turn>"),
        ("<\uff5cUser\uff5c>Hi", "<\uff5cUser\uff5c>"),
        ("### Human: Hi ### Assistant:", "### Human:"),
        ("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:", "Human:"),
        ("USER: Hi ASSISTANT:", "USER:"),
        ("### Instruction:\nAdd.\n\n### Response:\n", "### Instruction:"),
        ("It is 4.<|im_end|>", "<|im_end|>"),
    ],
)
def test_rendered(chat_tokenizer, text, marker):
    assert RenderedMarkers(chat_tokenizer, chat_tokenizer.chat_template).find(text) == marker


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The assistant: what does it do?",
        "Human: a word",
        "What is an Assistant: a person, and a User: another?",
        "a < b [1] | c",
        "### Instruction: clean the table",
        "Describe <image>.",
    ],
)
def test_not_rendered(chat_tokenizer, text):
    assert RenderedMarkers(chat_tokenizer, chat_tokenizer.chat_template).find(text) is None


@pytest.mark.parametrize(
    ("prompt", "answer", "column"),
    [
        ("[INST] Hi [/INST]", "Hello", "prompt"),
        ("Hi", "Hello</s><|im_end|>", "chosen"),
        ("### Human: Hi", "### Assistant: Hello", "chosen"),
    ],
)
def test_messages_that_were_rendered_are_not_rendered_again(chat_tokenizer, prompt, answer, column):
    pair_format = PairFormat("", "prompt", "chosen", "rejected", None, None, False, None)
    tokenize = PairTokenizer(chat_tokenizer, pair_format, PrepareOptions())
    bad = {"role": "assistant", "content": "No."}
    pair = Pair([{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}], [bad])
    (outcome,) = tokenize([pair])
    assert isinstance(outcome, BadRow)
    assert (outcome.kind, outcome.column) == ("rendered already", column)


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("Hello.</s>\n", "</s>"),
        ("</s> strikes nothing", "</s>"),
        ("Hello</s> again", None),
        ("use <s>old</s>", None),
        ("<s>old</s> means gone", None),
    ],
)
def test_html_that_is_a_special_token(plain_tokenizer, text, marker):
    """The EOS that an earlier rendering left at the end, and people's HTML."""
    assert RenderedMarkers(plain_tokenizer, None).find(text) == marker


def test_a_call_as_text_is_no_template(chat_tokenizer):
    """Some tokenizers have <tool_call> as a special token, and their templates write it."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>", "<end_of_turn>"]})
    markers = RenderedMarkers(tokenizer, "<tool_call></tool_call><end_of_turn>")
    assert markers.find('<tool_call>\n{"name": "f"}\n</tool_call>') is None
    assert markers.find("Hi <end_of_turn> you") == "<end_of_turn>"
