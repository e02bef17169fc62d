import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orpo_dist.data.turns import TurnFinder
from tests.data.conversations import assistant, user

# Mistral's: the system text stands in the last message of the user.
SYSTEM_LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.last %}SYS {% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# Phi's: a conversation without header of a reply has a mark of its own at its end.
ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<|stop|>{% endif %}"
)


def finder(template: str) -> TurnFinder:
    compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)

    def render(messages, generation):
        return compiled.render(messages=messages, add_generation_prompt=generation)

    return TurnFinder(render, ["<|user|>", "<|assistant|>", "<|end|>", "<|stop|>", "</s>"])


def test_the_system_text_in_the_last_message():
    turns = finder(SYSTEM_LAST)
    prompt, whole = [user("Hi")], [user("Hi"), assistant("Hello")]
    cut = turns.cut(prompt, [(whole, turns.render(whole, False))])
    assert cut.prompt == "[INST]SYS Hi[/INST]"
    assert turns.render(whole, False)[cut.answers_at[0] :] == " Hello</s>"


def test_a_prompt_that_is_gone_once_an_answer_follows():
    turns = finder("{{ messages[-1].content }}")
    whole = [user("Hi"), assistant("Hello")]
    assert turns.cut([user("Hi")], [(whole, turns.render(whole, False))]) is None


@pytest.mark.parametrize("template", [SYSTEM_LAST, ENDS])
def test_turns_of_others(template):
    turns = finder(template)
    messages = [
        user("Hi"),
        assistant("Hello"),
        user("And?"),
        user("Well?"),
        assistant("Bye"),
        user("x"),
        assistant("y"),
    ]
    text = turns.render(messages, False)
    stretches = [text[start:stop] for start, stop in turns.context(messages, 1, text)]
    expected = {
        SYSTEM_LAST: ["[INST]And?[/INST][INST]Well?[/INST]", "[INST]x[/INST]"],
        ENDS: ["<|user|>And?<|end|><|user|>Well?<|end|><|assistant|>", "<|user|>x<|end|><|assistant|>"],
    }
    assert stretches == expected[template]


def test_turns_that_leave_no_trace():
    turns = finder("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}")
    messages = [assistant("a"), user("b"), assistant("c")]
    assert turns.context(messages, 0, turns.render(messages, False)) is None
