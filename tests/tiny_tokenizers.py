"""Byte-level tokenizers trained on a few sentences in this process, so that no test needs a hub."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHATML_WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% if message.get('tool_calls') %}{{ message['tool_calls'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "How do I reset my password? Open the settings, choose security and follow the link.",
    "What is the capital of France? The capital of France is Paris, of course.",
    "Human: please help me with my order. Assistant: I am sorry to hear that, let me check.",
    "user assistant system tool question answer reply refund delivery account invoice",
    "One two three four five six seven eight nine ten eleven twelve.",
]


def train_bpe(special_tokens: list[str], vocab_size: int = 512) -> Tokenizer:
    """A byte-level BPE tokenizer; `special_tokens` get the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def beginning_with(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """The tokenizer, which now begins every text with `token`, as Llama's with BOS."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    return tokenizer
