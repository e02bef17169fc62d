"""Turns of the user in completions of text: whole dialogues, as in Anthropic's HH, or rendered by a template before.

As in completions of messages, the model sees them and is not trained to write them.
"""

from orpo_dist.errors import BadRow

NOTE = "turns of the user in completions of text, which are not in the loss"
# What begins the user's turn and what begins the assistant's, in public data sets and templates.
TURNS = (
    ("\n\nHuman:", "\n\nAssistant:"),
    ("\n\nHUMAN:", "\n\nASSISTANT:"),
    ("\n\nUser:", "\n\nAssistant:"),
    ("\n\nUSER:", "\n\nASSISTANT:"),
    ("### Human:", "### Assistant:"),
    ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    ("<|start_header_id|>user<|end_header_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("<start_of_turn>user\n", "<start_of_turn>model\n"),
    ("<|user|>", "<|assistant|>"),
    ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    ("[INST]", "[/INST]"),
)


def user_turns(prompt: str, completion: str, column: str) -> list[tuple[int, int]]:
    """The stretches of `completion` that are turns of the user, up to and with the beginning of the next answer; none
    where the prompt is no dialogue in the same words that ends with the beginning of an answer.

    Raises:
        BadRow: the completion ends with a turn of the user.
    """
    before = f"\n\n{prompt}"
    for user, assistant in TURNS:
        if user in completion and user in before and before.rstrip().endswith(assistant.strip()):
            return _stretches(completion, user, assistant, column)
    return []


def _stretches(completion: str, user: str, assistant: str, column: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    start = completion.find(user)
    while start >= 0:
        answer = completion.find(assistant, start)
        if answer < 0:
            shown = user.strip()
            raise BadRow("bad message", column, f"a completion is the assistant's, this one ends with a turn `{shown}`")
        stop = answer + len(assistant)
        found.append((start, stop))
        start = completion.find(user, stop)
    return found
