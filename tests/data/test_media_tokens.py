"""A token of the model that stands for media, typed by somebody: the row is a bad row, wherever it stands."""

import pytest

from orpo_dist.data.media_tokens import MediaTokens
from orpo_dist.data.pairs import Pair, PairFormat
from orpo_dist.data.tokenize_images import ImagePairTokenizer
from orpo_dist.errors import BadRow
from orpo_dist.images.decode import encode_image
from orpo_dist.options.data import PrepareOptions
from tests.data.processors import qwen_processor
from tests.model.tiny_vlms import FAMILIES, drawing, tiny_processor

FORMAT = PairFormat("", "prompt", "chosen", "rejected", "system", "tools", False, None, image="images")
PICTURE = {"bytes": encode_image(drawing(32, 24, 1)), "path": None}
TYPED = {
    "qwen2_5_vl": ["<image>", "<video>", "<|vision_start|>", "<|vision_end|>"],
    "qwen3_vl": ["<image>", "<video>", "<|vision_start|>", "<|vision_end|>"],
    "llava": ["<image>"],
    "llava_onevision": ["<image>", "<video>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>"],
    "smolvlm": ["<image>", "<fake_token_around_image>", "<global-img>"],
    "gemma3": ["<start_of_image>", "<IMG_CONTEXT>", "<end_of_image>"],
    "paligemma": ["<image>"],
    "internvl": ["<IMG_CONTEXT>", "<img>", "</img>"],
    "mistral3": ["<image>", "[IMG_BREAK]", "[IMG_END]"],
}
CASES = [(name, token) for name, tokens in TYPED.items() for token in tokens]


def outcome(processor, prompt="What?", chosen="A fox", rejected="No idea", images=(), **pair):
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}] if images else prompt
    messages = [*pair.pop("before", []), {"role": "user", "content": content}]
    replies = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    item = Pair(messages, *replies, images=list(images), **pair)
    (result,) = ImagePairTokenizer(processor, FORMAT, PrepareOptions(max_length=None))([item])
    return result


@pytest.mark.parametrize(("name", "token"), CASES)
def test_typed_in_messages(name, token):
    processor, text = tiny_processor(name), f"What does {token} mean?"
    assert token in processor.tokenizer.get_vocab()
    for places in ({"prompt": text}, {"chosen": text}, {"rejected": text}, {"prompt": text, "images": [PICTURE]},
                   {"before": [{"role": "system", "content": text}]}):  # fmt: skip
        result = outcome(processor, **places)
        assert isinstance(result, BadRow), places
        assert result.kind in ("media token", "image count", "image in a completion") and f"`{token}`" in result.reason


@pytest.mark.parametrize("name", FAMILIES)
def test_ordinary_rows_and_other_special_tokens_are_kept(name):
    processor = tiny_processor(name)
    assert not isinstance(outcome(processor), BadRow)
    assert not isinstance(outcome(processor, images=[PICTURE]), BadRow)
    assert not isinstance(outcome(processor, prompt="How is <video controls> or <img src=''> written?"), BadRow)


def text_outcome(prompt: str, images=(), chosen=" One."):
    item = Pair(prompt, chosen, " Two.", images=list(images))
    (result,) = ImagePairTokenizer(qwen_processor(), FORMAT, PrepareOptions(max_length=None))([item])
    return result


def test_typed_in_texts():
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    assert not isinstance(text_outcome(f"{place}What?", [PICTURE]), BadRow)
    for prompt, images in (("<|video_pad|>What?", []), (f"{place}<|video_pad|>What?", [PICTURE]),
                           ("<|vision_start|>What?", [])):  # fmt: skip
        result = text_outcome(prompt, images)
        assert isinstance(result, BadRow) and result.kind == "media token" and result.column == "prompt"
    result = text_outcome(f"{place}What?", [PICTURE], chosen=" <|vision_end|>")
    assert isinstance(result, BadRow) and result.column == "chosen"


def test_typed_in_tools():
    template = "{{ tools }}" + qwen_processor().chat_template
    item = Pair([{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "A"}],
                [{"role": "assistant", "content": "B"}], tools=[{"name": "<|video_pad|>"}])  # fmt: skip
    options = PrepareOptions(max_length=None, chat_template=template)
    (result,) = ImagePairTokenizer(qwen_processor(), FORMAT, options)([item])
    assert isinstance(result, BadRow) and result.kind == "media token"


def test_a_processor_that_refuses_the_drawing_declares_its_tokens():
    tokens = MediaTokens(qwen_processor(), [], [], "<|image_pad|>")
    with pytest.raises(BadRow, match="video_pad"):
        tokens.check_messages([{"role": "user", "content": "a <|video_pad|>"}], "prompt")
    tokens.check_messages([{"role": "user", "content": "a <|endoftext|>"}], "prompt")
