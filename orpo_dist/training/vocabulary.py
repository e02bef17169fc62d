"""Token ids that the model does not have, found before the first step and on every rank.

In training such an id is an IndexError on a CPU and a device-side assert on a GPU, which says nothing about the token
and, with several ranks, ends one of them in the middle of a collective.
"""

from typing import Any

from orpo_dist.errors import UserError
from orpo_dist.model.upstream import config_value
from orpo_dist.packing.token_ids import first_unknown, inside, largest_token


def vocabulary_of(config: Any) -> int:
    """Tokens that a model of this config has."""
    return config.get_text_config().vocab_size


def refuse_unknown_tokens(rows: Any, name: str, config: Any, tokenizer: Any) -> None:
    """rows: tokenised, a dict of such sets, or None; name: what the message calls them.

    Raises:
        UserError: a token id that the model has no embedding for.
    """
    if isinstance(rows, dict):
        for part, of_part in rows.items():
            refuse_unknown_tokens(of_part, f"{name}_{part}", config, tokenizer)
        return
    vocabulary = vocabulary_of(config)
    if rows is None or largest_token(rows) < vocabulary:
        return
    image = config_value(config, "image_token_id")  # may lie beyond the vocabulary: its embedding is never looked up
    found = first_unknown(rows, vocabulary, set() if image is None else {image})
    if found is None:
        return
    row, column, token = found
    raise UserError(
        f"{name}, pair {row}, {column.removesuffix('_ids')}: token id {token} "
        f"({tokenizer.convert_ids_to_tokens(token)!r}) is not in the model's vocabulary of {vocabulary}. A token that "
        f"was added to the tokenizer needs an embedding: model.resize_token_embeddings({len(tokenizer)}). Or the rows "
        "are tokenised for another model."
    )


def filler_token(config: Any, tokenizer: Any) -> int:
    """A token of the model for places that are never scored: the pad token, else the EOS token, else 0."""
    vocabulary = vocabulary_of(config)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        known = inside(token, vocabulary)
        if known is not None:
            return known
    return 0
