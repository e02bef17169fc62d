"""The table of docs/data.md: each bad input and the message it gets."""

import copy
import gzip
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from orpo_dist.data.prepare import prepare_pairs
from orpo_dist.data.sources import load_rows
from orpo_dist.errors import UserError
from orpo_dist.options.data import PrepareOptions
from tests.data.processors import qwen_processor
from tests.images.pictures import png_of

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data.md"
USER = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
GO = {"role": "assistant", "content": "Go"}
TEXT = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
CHAT = {"prompt": [USER], "chosen": [HELLO], "rejected": [GO]}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Hi"}],
    "chosen": {"from": "gpt", "value": "Hello"},
    "rejected": {"from": "gpt", "value": "Go"},
}
PICTURE = {"images": ["a.png"], "prompt": [USER], "chosen": [HELLO], "rejected": [GO]}
DIALOGUE = {"chosen": "Q: 2+2?\nA: 4", "rejected": "Q: 2+2?\nA: 5"}
CONVERSATION = {"chosen": [USER, HELLO], "rejected": [USER, GO]}


@dataclass
class Input:
    """Rows as JSON lines, or the bytes of a file."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "chat"
    content: bytes | None = None
    name: str = "pairs.jsonl"
    split: str = "train"
    policy: str = "error"
    card: list[dict[str, Any]] = field(default_factory=list)  # configs in the folder's README.md


def pictures(folder: Path) -> None:
    """a.png, sound; half.png, text.png, bomb.png, wide.png and large.png, each with its fault; secret.png outside."""
    Image.effect_noise((64, 64), 80).save(folder / "a.png")
    content = (folder / "a.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("<html>404</html>")
    (folder / "bomb.png").write_bytes(png_of(60_000, 60_000))
    (folder.parent / "secret.png").write_bytes(content)
    Image.new("RGB", (1000, 2)).save(folder / "wide.png")
    Image.new("RGB", (256, 256)).save(folder / "large.png")


def image(good: dict[str, Any] = PICTURE, options: dict[str, Any] | None = None, **bad: Any) -> Input:
    """As `second`, with a processor."""
    return second(good, "vlm", {"max_length": None, **(options or {})}, **bad)


def second(good: dict[str, Any], tokenizer: str = "chat", options: dict[str, Any] | None = None, **bad: Any) -> Input:
    """A good row, and one with the values `bad`."""
    return Input([good, {**good, **bad}], options or {}, tokenizer)


TEMPLATED = {"apply_chat_template": True}
REFUSING = (
    "{% for m in messages %}{% if m['content'] == 'No' %}{{ raise_exception('roles') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)
CUTS_THOUGHTS = "{% for m in messages %}{{ m['content'].split('</think>')[-1] }} {% endfor %}"
FORGETS = "{% if messages[-1]['role'] == 'assistant' %}{{ messages[-1]['content'] }}{% else %}Q: Hi{% endif %}"
THOUGHT = {"role": "assistant", "content": "<think>Greet.</think>Hello"}
WEATHER = [{"type": "function", "function": {"name": "get_weather"}}]
INPUTS = {
    "a completion that is empty text": second(TEXT, chosen=""),
    "a completion of white space": second(TEXT, rejected=" \n"),
    "an assistant's message without text": second(CHAT, chosen=[{"role": "assistant", "content": ""}]),
    "null instead of an answer": second(TEXT, chosen=None),
    "NaN instead of an answer": second(TEXT, rejected=float("nan")),
    "a fraction instead of an answer": second(TEXT, chosen=4.5),
    "text against messages": second(TEXT, rejected=[GO]),
    "a video in a message": second(CHAT, prompt=[{"role": "user", "content": [{"type": "video"}]}]),
    "chosen and rejected the same": second(TEXT, chosen="5"),
    "the same up to where they are cut": second(
        {**TEXT, "chosen": "one two three", "rejected": "four five six"},
        options={"max_completion_length": 3},
        chosen="one two three four",
        rejected="one two three five",
    ),
    "a prompt that leaves no room": second(TEXT, options={"max_length": 16}, prompt="one two three " * 9),
    "an empty prompt, no BOS token": second(TEXT, "no bos", prompt=""),
    "a prompt that merges with the answers, no BOS token": second(
        TEXT, "no bos", prompt=" a", chosen="ccount", rejected="nswer"
    ),
    "whole dialogues without a common beginning": second(DIALOGUE, chosen="4"),
    "whole conversations without a common beginning": second(CONVERSATION, chosen=[HELLO]),
    "a message without role": second(CHAT, prompt=[{"content": "Hi"}]),
    "a ShareGPT speaker nobody knows": second(SHAREGPT, conversations=[{"from": "alien", "value": "Hi"}]),
    "a tool's result that is an object": second(CHAT, prompt=[USER, HELLO, {"role": "tool", "content": {"t": 20}}]),
    "a role nobody knows": second(CHAT, prompt=[{"role": "alien", "content": "Hi"}]),
    "arguments of a call that are no JSON": second(
        CHAT, chosen=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]
    ),
    "half a character": second(TEXT, chosen="cut off \ud83d"),
    "a list of texts": second(CHAT, prompt=["Hi", "Hello", "What?"]),
    "messages of which a cell cannot be decoded": second(
        {"prompt": "Hi", "chosen": json.dumps(HELLO), "rejected": json.dumps(GO)},
        chosen="{'role': 'assistant', 'content': 'He",
    ),
    "earlier turns before plain text": second({**TEXT, "history": []}, history=[["Hi", "Hello"]]),
    "a completion by the user": second(CHAT, chosen=[{"role": "user", "content": "Hm"}]),
    "a prompt that ends with an answer": second(CHAT, prompt=[USER, HELLO]),
    "two system messages that differ": second(
        {**CHAT, "system": "A"}, prompt=[{"role": "system", "content": "B"}, USER]
    ),
    "tools that are no JSON": second({**CHAT, "tools": "[]"}, tools="[{"),
    "a system column beside plain text": second({**TEXT, "system": ""}, system="Be brief."),
    "text that is rendered already": second(TEXT, options=TEMPLATED, prompt="<|im_start|>user\nHi<|im_end|>\n"),
    "EOS at the end of an answer in a message": second(
        CHAT, chosen=[{"role": "assistant", "content": "Hm.<|im_end|>"}]
    ),
    "a row the template refuses": second(
        CHAT, options={"chat_template": REFUSING}, prompt=[{"role": "user", "content": "No"}]
    ),
    "reasoning in an answer that the template drops": second(
        CHAT, options={"chat_template": CUTS_THOUGHTS}, chosen=[THOUGHT]
    ),
    "tools that the template drops": second(
        {**CHAT, "tools": []}, options={"chat_template": CUTS_THOUGHTS}, tools=WEATHER
    ),
    "a prompt that the template forgets": Input([CHAT], {"chat_template": FORGETS}),
    "template variables that are no object": second({**CHAT, "chat_template_kwargs": "{}"}, chat_template_kwargs="[1]"),
    "template variables beside plain text": second(
        {**TEXT, "chat_template_kwargs": "{}"}, chat_template_kwargs='{"brief": true}'
    ),
    "an image column for a text-only model": Input([PICTURE]),
    "an image in a message, text-only model": second(CHAT, prompt=[{"role": "user", "content": [{"type": "image"}]}]),
    "the first image behind 200 rows, text-only model": Input([{**TEXT, "images": []}] * 200 + [{**TEXT, **PICTURE}]),
    "an image file that is not there": image(images=["gone.png"]),
    "an image without content": image(images=[None]),
    "a file that is not an image": image(images=["text.png"]),
    "an image that ends too early": image(images=["half.png"]),
    "a decompression bomb": image(images=["bomb.png"]),
    "a number instead of an image": image(images=7),
    "an image path that leaves the folder": image(images=["../secret.png"]),
    "an image's web address": image(images=["https://example.org/a.png"]),
    "an image's address in a message": image(
        {**CHAT, "images": []},
        prompt=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}]}],
    ),
    "more images than places": image(
        images=["a.png", "a.png"], prompt=[{"role": "user", "content": [{"type": "image"}]}]
    ),
    "a place without an image": image(images=[], prompt=[{"role": "user", "content": "<image>Hi"}]),
    "the model's own image token in the text": image(prompt=[{"role": "user", "content": "Hi <|image_pad|>"}]),
    "another token of the model's media in the text": image(prompt=[{"role": "user", "content": "Hi <|video_pad|>"}]),
    "an image in an answer": image(chosen=[{"role": "assistant", "content": [{"type": "image"}]}, HELLO]),
    "the model's image token in an answer": image(chosen=[{"role": "assistant", "content": "<|image_pad|>"}]),
    "an image that the processor refuses": image(images=["wide.png"]),
    "images with more tokens than max_prompt_length": image(options={"max_prompt_length": 40}, images=["large.png"]),
    "images that leave no room within max_length": image(options={"max_length": 60}, images=["large.png"]),
    "images that differ between the answers": Input([{**PICTURE, "rejected_images": ["a.png"]}]),
    "a video, in a column of its own": second(TEXT, videos=["a.mp4"]),
    "a place for a video": image(prompt=[{"role": "user", "content": "<image><video>Hi"}]),
    "a place for an image in another spelling": image(prompt=[{"role": "user", "content": "What is <image_1>?"}]),
    "an image beside the content of a message": image(prompt=[{**USER, "images": ["a.png"]}]),
    "an `index` without an image": image(prompt=[{"role": "user", "content": [{"type": "image", "index": 1}]}]),
    "pixels with negative values": image(images=[[-1.0, 1.0], [0.5, 0.5]]),
    "images in a column of another name": Input([{**CHAT, "photo": "a.png"}], {"max_length": None}, "vlm"),
    "an image column that is missing": Input([PICTURE], {"image_column": "photo"}),
    "a column that is missing": Input([{"prompt": "p", "chosen": "a"}]),
    "a mapped column that is missing": Input([TEXT], {"chosen_column": "good"}),
    "Alpaca's columns": Input([{"instruction": "Add", "input": "2 and 2", "chosen": "4", "rejected": "5"}]),
    "a prompt under another name": Input([{"question": "2+2=", "chosen": "4", "rejected": "5"}]),
    "messages, and a tokenizer without template": Input([CHAT], tokenizer="plain"),
    "messages, and apply_chat_template=false": Input([CHAT], {"apply_chat_template": False}),
    "a chat template that does not exist": Input([CHAT], {"chat_template": "chatlm"}),
    "a file without rows": Input(content=b"\n"),
    "no row left": Input([{**TEXT, "chosen": "5"}] * 2, policy="drop"),
    "more bad rows than allowed": Input([TEXT, TEXT, TEXT, {**TEXT, "chosen": ""}], policy="drop"),
    "a broken JSON line": Input(content=b'{"prompt": "a"}\n{"prompt": "b", \n'),
    "a key twice in one JSON object": Input(
        content=b'{"prompt": "a"}\n{"prompt": "b", "chosen": "c", "chosen": "d"}\n'
    ),
    "a number with thousands of digits": Input(content=b'{"prompt": "a"}\n{"prompt": ' + b"9" * 5000 + b"}\n"),
    "JSON that is nested too deeply": Input(content=b'{"prompt": "a"}\n' + b'{"prompt": ' * 200_000 + b"\n"),
    "a compressed file that is damaged": Input(
        content=gzip.compress(b'{"prompt": "a"}\n' * 99)[:-12], name="pairs.jsonl.gz"
    ),
    "a table without the names of its columns": Input(content=b'[["a", "b", "c"]]', name="pairs.json"),
    "a JSON line that is no object": Input(content=b'{"prompt": "a"}\n["b"]\n'),
    "a CSV line with a cell too many": Input(content=b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", name="pairs.csv"),
    "a CSV cell whose quotes do not end": Input(content=b'prompt,chosen,rejected\na,b,"c\na,b,d\n', name="pairs.csv"),
    "two columns of one name": Input(content=b"prompt,chosen,rejected,chosen\na,b,c,d\n", name="pairs.csv"),
    "a file that is not UTF-8": Input(content=b'{"prompt": "\xe4"}\n'),
    "a file that does not exist": Input(name="missing.jsonl"),
    "a split that does not exist": Input([TEXT], name="folder/train.jsonl", split="test"),
    "a split that the card does not name": Input(
        [TEXT],
        name="folder/a.jsonl",
        card=[{"config_name": "default", "data_files": [{"split": "gold", "path": "a*"}]}],
    ),
    "a card with several configurations": Input(
        [TEXT],
        name="folder/a.jsonl",
        card=[{"config_name": name, "data_files": "a.jsonl"} for name in ("easy", "hard")],
    ),
    "a configuration that the card does not have": Input(
        [TEXT], name="folder/a.jsonl", split="hrd:train", card=[{"config_name": "hard", "data_files": "a.jsonl"}]
    ),
    "a file of the card that is not there": Input(
        [TEXT], name="folder/a.jsonl", card=[{"config_name": "default", "data_files": "b.jsonl"}]
    ),
    "a split that a JSON file does not hold": Input(content=b'{"test": [{"prompt": "a"}]}', name="pairs.json"),
}


def table() -> dict[str, str]:
    """Input and message of each line of the table in docs/data.md."""
    section = DOCS.read_text(encoding="utf-8").split("## Bad input and its message")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (.+?) \| `` ?(.+)`` \|$", section, flags=re.MULTILINE)
    return {what: message.replace("\\|", "|") for what, message in lines}


def test_every_documented_input_is_tested():
    assert list(table()) == list(INPUTS)
    assert len(INPUTS) >= 15


@pytest.mark.parametrize("what", INPUTS)
def test_message(what, chat_tokenizer, plain_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    case = INPUTS[what]
    path = Path(case.name)
    path.parent.mkdir(exist_ok=True)
    if case.content is not None:
        path.write_bytes(case.content)
    elif case.rows:
        pictures(path.parent)
        path.write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    if case.card:
        (path.parent / "README.md").write_text(f"---\nconfigs: {json.dumps(case.card)}\n---\n")
    tokenizer = {"chat": chat_tokenizer, "plain": plain_tokenizer, "vlm": qwen_processor()}.get(case.tokenizer)
    if tokenizer is None:
        tokenizer = copy.deepcopy(chat_tokenizer)
        tokenizer.bos_token = None

    with pytest.raises(UserError) as caught:
        rows = load_rows(str(path.parent if path.parent.name else path), split=case.split)
        prepare_pairs(rows, tokenizer, PrepareOptions(on_bad_row=case.policy, **case.options))
    expected = ".*".join(re.escape(part) for part in table()[what].split("..."))
    assert re.search(expected, " ".join(str(caught.value).split())), str(caught.value)
