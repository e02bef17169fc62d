"""Text that a chat template was applied to before: recognised by what templates write around the turns.

Rendered again, its markers would stand twice in the tokens, and the model would learn to write them in its answers.
"""

import re

from transformers import PreTrainedTokenizerBase

# What public templates write and people do not: Llama 2 and Mistral, chatml, Llama 3, Gemma, Zephyr and Phi, DeepSeek,
# Command R, gpt-oss.
MARKERS = (
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|start|>assistant",
)
MEDIA = ("image", "img", "video", "audio", "vision")  # tokens for media, which place_images.py and its callers judge
# Templates of words, which people write too: rendered is what starts with the user's marker and has the assistant's.
DIALOGUES = (
    re.compile(r"\s*### Human:.*### Assistant:", re.DOTALL),
    re.compile(r"\s*Human:.*\n\s*Assistant:", re.DOTALL),
    re.compile(r"\s*(?:USER|User):.*(?:ASSISTANT|Assistant):", re.DOTALL),
    re.compile(r"\s*GPT4 Correct User:.*GPT4 Correct Assistant:", re.DOTALL),
    re.compile(r"(?:\s*Below is an instruction.*?)?\s*### Instruction:.*### Response:", re.DOTALL),
)


# Also <tool_call>, special in some tokenizers: in NousResearch/hermes-function-calling-v1 answers spell calls.
TAG = re.compile(r"</?(?:[a-z]+|tool_[a-z]+)>")


class RenderedMarkers:
    """The signs of a chat template in a text, for one tokenizer: those of public templates, and its own special tokens
    as far as its template writes them, with EOS. `<s>` and `</s>` are HTML too: they are signs at the beginning or the
    end of a text that has only one of the two.

    Args:
        template: the chat template that would render the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None):
        own = [token for token in tokenizer.all_special_tokens if token in (template or "")]
        own += [tokenizer.eos_token] if tokenizer.eos_token else []
        own = [token for token in own if not any(word in token.lower() for word in MEDIA)]
        self.tags = {token for token in own if TAG.fullmatch(token)}
        markers = {*MARKERS, *own} - self.tags
        # The longest first, so that the message names the whole marker.
        self.pattern = re.compile("|".join(re.escape(m) for m in sorted(markers, key=lambda m: (-len(m), m))))

    def find(self, text: str) -> str | None:
        """The first marker in the text; None where it has none."""
        found = self.pattern.search(text)
        if found:
            return found[0]
        if tag := next((tag for tag in self.tags if _ends_with_one(text.strip(), tag)), None):
            return tag
        if "uman:" not in text and "ser:" not in text and "USER:" not in text and "### Instruction:" not in text:
            return None
        dialogue = next((match for dialogue in DIALOGUES if (match := dialogue.match(text))), None)
        return dialogue[0].strip().split("\n")[0].split(":")[0] + ":" if dialogue else None


def _ends_with_one(text: str, tag: str) -> bool:
    """Whether the tag stands at an end of the text, without its partner somewhere in it."""
    if not text.startswith(tag) and not text.endswith(tag):
        return False
    partner = f"<{tag[2:]}" if tag[1] == "/" else f"</{tag[1:]}"
    return partner not in text
