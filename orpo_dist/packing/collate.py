"""Rows of token ids to one packed row of the packed layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orpo_dist.packing.layout import PackedLayout, PairSegment, position_ids
from orpo_dist.packing.split import SequencePlace


@dataclass(frozen=True)
class PackedCollator:
    """Rows of token ids to one row without padding, the prompt of a pair in it once. Runs on the CPU.

    Two pairs with prefix_sharing and nll_scope="sequence":

        {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2], "weight": 1.0, "index": 0}
        {"prompt_ids": [5],    "chosen_ids": [4, 2], "rejected_ids": [3, 2],    "weight": 1.0, "index": 1}

                          P   P   C   C   R   R   R | P   C   C   R   R
        place             0   1   2   3   4   5   6 | 7   8   9  10  11
        input_ids      [[ 5,  6,  7,  2,  8,  9,  2,  5,  4,  2,  3,  2]]   (1, T)
        position_ids   [[ 0,  1,  2,  3,  2,  3,  4,  0,  1,  2,  1,  2]]   (1, T)

        orpo_layout.rows           [0, 1, 2,  1, 4, 5,   7, 8,  7, 10]      row 1 predicts both 7 and 8
        orpo_layout.targets        [6, 7, 2,  8, 9, 2,   4, 2,  3,  2]
        orpo_layout.cu_seqlens_q   [0, 4, 7, 10, 12]                        queries: [P C] [R] [P C] [R]
        orpo_layout.cu_seqlens_k   [0, 4, 9, 12, 15]                        keys:    [P C] [P R] [P C] [P R]
        orpo_layout.key_index      [0, 1, 2, 3,  0, 1, 4, 5, 6,  7, 8, 9,  7, 10, 11]

    With prefix_sharing=False the row is [P C][P R] [P C][P R]; with nll_scope="completion" the rows that predict
    prompt tokens (row 0 above) are not scored. Tokens that `chosen_context` and `rejected_context` name, as
    [start, stop, ...] within their completion, are in the row and not scored: turns that the model did not write.

    sequence: this rank's place where several ranks share the row. The tensors are of the whole row on each of them.

    Raises:
        ValueError: a prompt or a completion without tokens; the data step drops such pairs.
    """

    prefix_sharing: bool
    nll_scope: str
    sequence: SequencePlace | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids: list[int] = []
        segments = []
        for row in rows:
            prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
            if not (prompt and chosen and rejected):
                raise ValueError(f"pair {row['index']} has an empty prompt or completion")
            segments.append(
                PairSegment(
                    start=len(ids),
                    prompt=len(prompt),
                    chosen=len(chosen),
                    rejected=len(rejected),
                    prompt_copies=1 if self.prefix_sharing else 2,
                    nll_prompt=len(prompt) - 1 if self.nll_scope == "sequence" else 0,
                    chosen_context=row.get("chosen_context") or (),
                    rejected_context=row.get("rejected_context") or (),
                )
            )
            ids += prompt + chosen + (rejected if self.prefix_sharing else prompt + rejected)
        input_ids = torch.tensor(ids)
        weight = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
        layout = PackedLayout(segments, input_ids, weight, [row["index"] for row in rows])
        return {
            "input_ids": input_ids[None],
            "position_ids": position_ids(segments)[None],
            "orpo_layout": layout.split_over(self.sequence),
        }
