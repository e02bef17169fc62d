import pytest

from orpo_dist.data.chat_template import resolve_chat_template
from orpo_dist.errors import UserError


def test_chat_template_option(chat_tokenizer, plain_tokenizer, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0]['content'] }}")
    assert resolve_chat_template(None, plain_tokenizer) is None
    assert resolve_chat_template("tokenizer", chat_tokenizer) == chat_tokenizer.chat_template
    assert resolve_chat_template(str(file), chat_tokenizer) == file.read_text()
    assert resolve_chat_template("{{ x }}", chat_tokenizer) == "{{ x }}"
    with pytest.raises(UserError, match="chat_template=nonsense"):
        resolve_chat_template("nonsense", chat_tokenizer)
