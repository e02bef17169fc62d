import copy

import pytest

from orpo_dist.data.chat_template import read_template_kwargs, resolve_chat_template
from orpo_dist.errors import BadRow, UserError


def test_chat_template_option(chat_tokenizer, plain_tokenizer, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0]['content'] }}")
    assert resolve_chat_template(None, plain_tokenizer) is None
    assert resolve_chat_template("tokenizer", chat_tokenizer) == chat_tokenizer.chat_template
    assert resolve_chat_template(str(file), chat_tokenizer) == file.read_text()
    assert resolve_chat_template("{{ x }}", chat_tokenizer) == "{{ x }}"
    with pytest.raises(UserError, match="chat_template=nonsense"):
        resolve_chat_template("nonsense", chat_tokenizer)


def test_templates_by_name(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = {"tool_use": "{{ 1 }}", "default": "{{ 2 }}"}
    assert resolve_chat_template(None, tokenizer) == "{{ 2 }}"
    assert resolve_chat_template(None, tokenizer, tools=True) == "{{ 1 }}"
    assert resolve_chat_template("tool_use", tokenizer) == "{{ 1 }}"
    tokenizer.chat_template = {"tool_use": "{{ 1 }}", "rag": "{{ 2 }}"}
    with pytest.raises(UserError, match="the chat templates rag, tool_use, and none of them is `default`"):
        resolve_chat_template(None, tokenizer)


@pytest.mark.parametrize("value", [None, "", {}, {"enable_thinking": None}])
def test_no_template_kwargs(value):
    assert read_template_kwargs(value, "chat_template_kwargs") == {}


def test_template_kwargs():
    assert read_template_kwargs('{"enable_thinking": false}', "c") == {"enable_thinking": False}
    assert read_template_kwargs("{'enable_thinking': False}", "c") == {"enable_thinking": False}
    for value, reason in (("{", "not valid JSON"), ([1], "is not an object"), ({"tokenize": True}, "tokenize: not")):
        with pytest.raises(BadRow, match=reason):
            read_template_kwargs(value, "c")
