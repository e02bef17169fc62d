"""Prompts with images against what each family's own processor makes of the whole text."""

import copy

import pytest
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast

from orpo_dist.data.pairs import Pair, PairFormat
from orpo_dist.data.tokenize_images import ADDED, ImagePairTokenizer, TokenizedImagePair
from orpo_dist.data.tokenizer_identity import tokenizer_digest
from orpo_dist.errors import BadRow, UserError
from orpo_dist.images.decode import encode_image, open_image
from orpo_dist.options.data import PrepareOptions
from orpo_dist.packing.images import process_prompts
from tests.data.processors import qwen_processor
from tests.model.further_vlms import further_vlm
from tests.model.tiny_vlms import FAMILIES, drawing, tiny_processor
from tests.tiny_tokenizers import train_bpe

FORMAT = PairFormat("", "prompt", "chosen", "rejected", None, None, False, None, image="images")
IMAGE = {"type": "image"}


def stored(width: int, height: int, seed: int = 0) -> dict:
    return {"bytes": encode_image(drawing(width, height, seed)), "path": None}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def pair(content, images=(), chosen="Paris, of course.", rejected="The river bank.") -> Pair:
    def reply(text: str) -> list[dict]:
        return [{"role": "assistant", "content": text}]

    return Pair([{"role": "user", "content": content}], reply(chosen), reply(rejected), images=list(images))


def tokenize(processor, item: Pair, **options) -> TokenizedImagePair:
    options = {"max_length": None, **options}
    (result,) = ImagePairTokenizer(processor, FORMAT, PrepareOptions(**options))([item])
    if isinstance(result, BadRow):
        raise result
    return result


ONE = pair([IMAGE, words("What is the capital?")], [stored(32, 24)])
TWO = pair([words("Compare "), IMAGE, words(" with "), IMAGE, words(" now")], [stored(16, 16, 1), stored(20, 40, 2)])
LAST = pair([words("Tell me of "), IMAGE], [stored(12, 44, 3)])
LINES = pair([words("one\n"), IMAGE, words("\n\ntwo")], [stored(24, 24, 4)])
NONE = pair("What is the capital?")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("item", [ONE, TWO, LAST, LINES], ids=["one", "two", "last", "lines"])
def test_what_the_processor_makes_of_the_whole_text(name, item):
    processor, result = tiny_processor(name), tokenize(tiny_processor(name), item)
    eos = processor.tokenizer.eos_token_id
    opened = [open_image(image) for image in item.images]
    for side, ids in ((item.chosen, result.chosen_ids), (item.rejected, result.rejected_ids)):
        text = side[0]["content"] + "<|im_end|>\n"
        more = {"text": [result.prompt_text + text]}
        if name == "paligemma":  # completions are a suffix there, which the processor ends with EOS
            more = {"text": [result.prompt_text], "suffix": [text]}
        whole = processor(**more, images=[opened], add_special_tokens=False)["input_ids"][0]
        whole = [int(token) for token in whole]
        assert result.prompt_ids + ids == (whole[: -1 if name == "paligemma" else None])
        assert ids[-2:][0] == eos or ids[-1] == eos
    assert [tuple(size) for size in result.image_sizes] == [image.size for image in opened]
    assert result.images == item.images


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_without_images(name):
    processor, result = tiny_processor(name), tokenize(tiny_processor(name), NONE)
    assert processor.tokenizer.decode(result.prompt_ids) == (
        "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (result.images, result.image_tokens, result.image_sizes, result.prompt_places) == ([], 0, [], [])


def test_row_breaks_of_pixtral():
    """32 x 24 pixels in patches of 4 merged by 2: four columns, three rows."""
    text = tiny_processor("mistral3").tokenizer.decode(tokenize(tiny_processor("mistral3"), ONE).prompt_ids)
    rows = "[IMG_BREAK]".join(["<image>" * 4] * 3)
    assert f"user\n{rows}[IMG_END]What is" in text


def test_tiles_of_idefics3():
    """32 x 24 pixels are 32 x 32 after resizing: four tiles of 16 x 16 and the whole image, four tokens each."""
    result = tokenize(tiny_processor("idefics3"), ONE)
    text = tiny_processor("idefics3").tokenizer.decode(result.prompt_ids)
    mark, tokens = "<fake_token_around_image>", "<image>" * 4
    tiles = "".join("".join(f"{mark}<row_{row}_col_{column}>{tokens}" for column in (1, 2)) + "\n" for row in (1, 2))
    assert f"user\n{tiles}\n{mark}<global-img>{tokens}{mark}What is" in text
    assert result.image_tokens == 5 * (4 + 2) + 1 + len(tiny_processor("idefics3").tokenizer("\n\n").input_ids) + 1


def test_tokens_of_qwen():
    """One token per 32 x 32 pixels, between the two marks."""
    result = tokenize(qwen_processor(), pair([IMAGE, words("Hi")], [stored(96, 64)]))
    text = qwen_processor().tokenizer.decode(result.prompt_ids)
    assert text == (
        "<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * 6
        + "<|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert result.image_tokens == 8 and result.image_sizes == [[96, 64]]
    assert result.prompt_text.count("<|image_pad|>") == 1 and result.prompt_places == []


# -- text and templates --


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("What?", "{0}{0}What?"),
        ("<image>What <image>?", "{0}What {0}?"),
        ("a<|vision_start|><|image_pad|><|vision_end|>b<|image_pad|>", "a{0}b<|image_pad|>"),
    ],
)
def test_text_without_a_template(prompt, expected):
    item = Pair(prompt, " One.", " Two.", images=[stored(64, 64), stored(64, 64)])
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    assert tokenize(qwen_processor(), item).prompt_text == expected.format(place)


PART = "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
TEMPLATES = {
    # LLaVA's: only lists; images first, wherever they stand
    "lists": (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] | selectattr('type', 'equalto', 'image') %}"
        "<image>\n{% endfor %}{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }}"
        "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "user: <image>\nWhat is the capital?\nassistant: ",
    ),
    # Pixtral's: lists for the user, text for the assistant
    "mixed": (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for part in m['content'] %}" + PART + "{% endfor %}{% endif %}[/INST]{% else %}"
        "{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
        "[INST]<image>What is the capital?[/INST]",
    ),
    "text": ("chatml", "<|im_start|>user\n<image>What is the capital?<|im_end|>\n<|im_start|>assistant\n"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_want_their_content_in_different_spellings(kind):
    template, expected = TEMPLATES[kind]
    result = tokenize(tiny_processor("llava"), ONE, chat_template=template)
    assert result.prompt_text == expected
    completion = tiny_processor("llava").tokenizer.decode(result.chosen_ids)
    assert completion.strip().removesuffix("<|im_end|>").strip() == "Paris, of course."
    text_only = tokenize(tiny_processor("llava"), NONE, chat_template=template)
    assert text_only.prompt_text == expected.replace("<image>\n", "").replace("<image>", "")


def test_the_processors_own_template_is_used_before_the_tokenizers():
    processor = copy.deepcopy(qwen_processor())
    processor.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert tokenize(processor, NONE).prompt_text == tokenize(qwen_processor(), NONE).prompt_text


# -- cuts --

LONG = pair(
    [words("one two three four five "), IMAGE, words(" six seven eight "), IMAGE, words(" nine ten eleven twelve")],
    [stored(32, 24, 1), stored(20, 40, 2)],
)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cut_leaves_every_image_whole(name, side):
    processor = tiny_processor(name)
    whole = tokenize(processor, LONG)
    limit = len(whole.prompt_ids) - 12
    cut = tokenize(processor, LONG, max_prompt_length=limit, truncation_side=side)
    assert len(cut.prompt_ids) == limit and cut.truncated_prompt and cut.image_tokens == whole.image_tokens
    special = set(processor.tokenizer.added_tokens_decoder) - {0, 1, 2, 3}
    marks = [[token for token in result.prompt_ids if token in special] for result in (whole, cut)]
    assert marks[0] == marks[1] and len(marks[0]) >= 8  # no token of an image is gone
    text = processor.tokenizer.decode(cut.prompt_ids)
    assert ("one two" in text) == (side == "right") and ("eleven twelve" in text) == (side == "left")
    if side == "right":
        assert text.rstrip("\n").endswith("<|im_start|>assistant")
    rest = [place for place in cut.prompt_places if place != ADDED]
    assert rest == sorted(set(rest))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_collator_takes_cut_prompts(name):
    """Token kinds of the tokens that are left, and the same pixels."""
    processor, rows = tiny_processor(name), []
    for item, options in ((LONG, {"max_prompt_length": 60}), (LONG, {}), (NONE, {})):
        length = len(tokenize(processor, item).prompt_ids)
        limit = {"max_prompt_length": length - 9} if options else {}
        rows.append({**vars(tokenize(processor, item, **limit)), "index": len(rows)})
    made = process_prompts(processor, rows)
    assert made.counts == [2, 2, 0]
    for kinds in made.token_types.values():
        assert [len(kind) for kind in kinds] == [len(row["prompt_ids"]) for row in rows]
        cut, whole = (
            [token for token, kind in zip(row["prompt_ids"], kinds[index].tolist(), strict=True) if kind]
            for index, row in enumerate(rows[:2])
        )
        assert cut == whole and (whole or name == "paligemma")  # whose kinds are prefix and suffix


def test_images_that_do_not_fit_are_never_cut():
    tokens = tokenize(qwen_processor(), LONG).image_tokens
    with pytest.raises(BadRow) as caught:
        tokenize(qwen_processor(), LONG, max_prompt_length=tokens - 1)
    assert caught.value.kind == "images too long" and f"the images take {tokens} tokens" in caught.value.reason
    assert len(tokenize(qwen_processor(), LONG, max_prompt_length=tokens).prompt_ids) == tokens


def test_completions_are_cut_as_ever():
    whole = tokenize(qwen_processor(), ONE)
    cut = tokenize(qwen_processor(), ONE, max_length=len(whole.prompt_ids) + 2)
    assert cut.prompt_ids == whole.prompt_ids and cut.chosen_ids == whole.chosen_ids[:2]


def test_a_text_row_begins_as_the_processor_begins_every_text():
    """Molmo 2's writes BOS itself, with images and without."""
    processor, _ = further_vlm("Molmo 2")
    bos = processor.tokenizer.bos_token_id
    asked = [{"role": "user", "content": NONE.prompt[0]["content"]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    result = tokenize(processor, NONE)
    assert result.prompt_ids == processor(text=[text], add_special_tokens=False)["input_ids"][0]
    assert result.prompt_ids[0] == tokenize(processor, ONE).prompt_ids[0] == bos
    assert tiny_processor("llava").tokenizer.bos_token_id not in tokenize(tiny_processor("llava"), NONE).prompt_ids


# -- the key of the cache --


def test_image_settings_are_part_of_the_digest(tmp_path):
    digest = tokenizer_digest(qwen_processor())
    assert tokenizer_digest(copy.deepcopy(qwen_processor())) == digest
    for change in (
        lambda p: setattr(p.image_processor, "size", {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}),
        lambda p: setattr(p.image_processor, "do_resize", False),
        lambda p: setattr(p, "chat_template", "{{ messages }}"),
        lambda p: p.tokenizer.add_tokens(["<new>"]),
    ):
        other = copy.deepcopy(qwen_processor())
        change(other)
        assert tokenizer_digest(other) != digest


def test_photographs():
    from sklearn.datasets import load_sample_images

    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    item = pair([IMAGE, IMAGE, words("Compare.")], [{"bytes": encode_image(i), "path": None} for i in images])
    result = tokenize(qwen_processor(), item)
    assert result.image_sizes == [[640, 427], [640, 427]]
    # 427 x 640 is scaled to at most 64 tokens of 32 x 32: 6 rows of 9
    assert result.image_tokens == 2 * (6 * 9 + 2)


def test_a_processor_that_places_images_itself_is_refused():
    """BLIP-2's writes the image's tokens before the text, and a placeholder in it would be one token more."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(["<pad>", "<s>", "</s>", "<image>"]), eos_token="</s>", pad_token="<pad>"
    )
    images = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    processor = transformers.Blip2Processor(images, tokenizer, num_query_tokens=4)
    pair_format = PairFormat("", "prompt", "chosen", "rejected", None, None, False, False, "images", has_images=True)
    with pytest.raises(UserError, match="Blip2Processor puts an image before the text by itself"):
        ImagePairTokenizer(processor, pair_format, PrepareOptions())
