"""Token counts and costs of pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class PairLengths:
    """Tokens of one pair: prompt P, chosen C, rejected R."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def shared_tokens(self) -> int:
        return self.prompt + self.chosen + self.rejected

    @property
    def longest_sequence(self) -> int:
        """P + C or P + R, whichever is longer."""
        return self.prompt + max(self.chosen, self.rejected)

    @property
    def query_keys(self) -> float:
        """Causal query-key pairs with the prompt shared."""
        branch = self.rejected * self.prompt + self.rejected * (self.rejected + 1) / 2
        return (self.prompt + self.chosen) * (self.prompt + self.chosen + 1) / 2 + branch


def pair_costs(lengths: Sequence[PairLengths], hidden_size: int) -> list[float]:
    """Work of each pair in units of one token through the linear layers.

    A block does about 24 H^2 FLOPs per token in its linear layers and 4 H per (query, key) in attention, so a
    query-key pair counts 1 / (6 H) tokens.
    """
    return [pair.shared_tokens + pair.query_keys / (6 * hidden_size) for pair in lengths]


def token_counts(rows: Any, token_id: int) -> list[int]:
    """How often a token occurs in each prompt; for the image token, the number of image tokens."""
    if isinstance(rows, list):
        return [list(row["prompt_ids"]).count(token_id) for row in rows]
    counts: list[int] = []
    for batch in rows.select_columns(["prompt_ids"]).with_format("numpy").iter(10_000):
        counts += [int((ids == token_id).sum()) for ids in batch["prompt_ids"]]
    return counts


def sharing_gain(lengths: Sequence[PairLengths]) -> float:
    """(2P + C + R) / (P + C + R) over all pairs: the factor in tokens saved by sharing prompts, at most 2."""
    shared = sum(pair.shared_tokens for pair in lengths)
    return 1 + sum(pair.prompt for pair in lengths) / shared if shared else 1.0


def is_tokenised(rows: Any) -> bool:
    """Whether `rows` are already tokenised: a non-empty list of dicts or a datasets.Dataset with TOKEN_COLUMNS."""
    columns = rows[0].keys() if isinstance(rows, list) and rows else getattr(rows, "column_names", None) or ()
    return set(TOKEN_COLUMNS) <= set(columns)


def pair_lengths(rows: Any) -> list[PairLengths]:
    """Token counts of every row, read from Arrow's offsets where `rows` is a datasets.Dataset."""
    if isinstance(rows, list):
        return [PairLengths(*(len(row[column]) for column in TOKEN_COLUMNS)) for row in rows]
    lengths: list[PairLengths] = []
    for batch in rows.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(10_000):
        columns = [batch[column].combine_chunks().value_lengths().to_pylist() for column in TOKEN_COLUMNS]
        lengths += [PairLengths(*row) for row in zip(*columns, strict=True)]
    return lengths
