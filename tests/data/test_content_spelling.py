"""Each role's content reaches a template in a spelling that the template takes; no list of parts is ever printed."""

from pathlib import Path

import jinja2
import pytest
import trl

from orpo_dist.data.content_spelling import ContentSpelling, prints_parts

IMAGE = {"type": "image"}
PART = "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
EITHER = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    + PART
    + "{% endfor %}{% endif %}"
)
LISTS = "{% for part in m['content'] %}" + PART + "{% endfor %}"
PLAIN = "{{ m['content'] }}"


def by_role(**content: str) -> str:
    """A template that takes the content of each role in its own way."""
    branches = "".join(f"{{% elif m['role'] == '{role}' %}}[{role}]{how}" for role, how in content.items())
    branches = branches.replace("elif", "if", 1)
    return "{% for m in messages %}" + branches + "{% endif %}\n{% endfor %}"


def spelling_of(template: str) -> ContentSpelling:
    compiled = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).from_string(template)
    return ContentSpelling(lambda messages: compiled.render(messages=messages), "<image>")


WAYS = {"either": EITHER, "lists": LISTS, "plain": PLAIN}


@pytest.mark.parametrize("system", WAYS)
@pytest.mark.parametrize("user", ["either", "lists"])
@pytest.mark.parametrize("assistant", WAYS)
@pytest.mark.parametrize("tool", WAYS)
def test_every_role_by_itself(system, user, assistant, tool):
    template = by_role(system=WAYS[system], user=WAYS[user], assistant=WAYS[assistant], tool=WAYS[tool])
    spelling = spelling_of(template)
    text = spelling.render([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "I look."},
        {"role": "tool", "content": "A fox"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "A fox."},
    ])  # fmt: skip
    assert text == (
        "[system]Be brief.\n[user]<image>What?\n[assistant]I look.\n[tool]A fox\n[user]And?\n[assistant]A fox.\n"
    )
    assert spelling.image_text == "<image>"


@pytest.mark.parametrize("how", ["{{ m['content'] | tojson }}", "{{ m['content'] }}", "{{ m['content'] ~ '' }}"])
def test_a_role_whose_parts_would_be_printed(how):
    spelling = spelling_of(by_role(system=how, user=EITHER, assistant=EITHER))
    assert spelling.spelled({"role": "system", "content": "Be brief."})["content"] == "Be brief."


def test_text_stays_as_it_was_written_where_the_template_takes_it():
    """Gemma 4's template writes a space after each part of a system message."""
    spaced = EITHER.replace("{{ part['text'] }}", "{{ part['text'] ~ ' ' }}")
    spelling = spelling_of(by_role(system=spaced, user=spaced, assistant=spaced))
    for role in ("system", "user", "assistant"):
        assert spelling.spelled({"role": role, "content": "Be brief."})["content"] == "Be brief."


def test_a_role_that_the_template_refuses_is_left_as_it_is():
    spelling = spelling_of(by_role(system="{{ 1 / 0 }}", user=EITHER, assistant=EITHER))
    for role in ("system", "nobody"):
        assert spelling.spelled({"role": role, "content": "Be brief."})["content"] == "Be brief."


def test_a_template_of_text_alone():
    spelling = spelling_of(by_role(system=PLAIN, user=PLAIN, assistant=PLAIN))
    message = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}
    assert spelling.spelled(message)["content"] == "<image>What?"


def test_without_a_template():
    spelling = ContentSpelling(None, "<image>")
    assert spelling.spelled({"role": "user", "content": "What?"})["content"] == "What?"
    assert spelling.image_text == "<image>"


FILES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
WITH_IMAGES = [file for file in FILES if "image" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", WITH_IMAGES, ids=lambda file: file.stem)
def test_templates_of_trl_print_no_list(file, chat_tokenizer):
    template = file.read_text(encoding="utf-8")

    def render(messages):
        return chat_tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)

    image = next((mark for mark in ("<|image_pad|>", "<start_of_image>", "<|image|>", "<|patch|>") if mark in template),
                 "<image>")  # fmt: skip
    spelling = ContentSpelling(render, image)
    for system in ([], [{"role": "system", "content": "Be very brief."}]):
        user = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is drawn?"}]}
        text = spelling.render([*system, user, {"role": "assistant", "content": "A red fox."}])
        assert "What is drawn?" in text and "A red fox." in text and not prints_parts(text.split("Be very")[-1])
        assert text.count(image) == 1 and ("Be very brief." in text) == bool(system)
