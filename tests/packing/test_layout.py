"""Index tensors of the packed layout against their definition, for random pairs."""

import random
from itertools import pairwise

import pytest
import torch
from accelerate.utils import send_to_device

from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.layout import PackedLayout


def _random_rows(seed: int) -> list[dict]:
    """Pairs whose token ids are all different, so that a token names its place."""
    rng, ids, rows = random.Random(seed), iter(range(10_000)), []
    for index in range(5):
        prompt, chosen, rejected = ([next(ids) for _ in range(rng.choice([1, 2, 7]))] for _ in range(3))
        rows.append(
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "weight": 1.0, "index": index}
        )
    return rows


def _sequences(rows: list[dict]) -> list[list[int]]:
    return [row["prompt_ids"] + row[side] for row in rows for side in ("chosen_ids", "rejected_ids")]


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_keys_and_queries_of_every_sequence(seed, sharing):
    rows = _random_rows(seed)
    batch = PackedCollator(sharing, "sequence")(rows)
    ids, layout = batch["input_ids"][0], batch["orpo_layout"]
    keys = ids if layout.key_index is None else ids[layout.key_index]
    for i, sequence in enumerate(_sequences(rows)):
        key_ids = keys[layout.cu_seqlens_k[i] : layout.cu_seqlens_k[i + 1]].tolist()
        query_ids = ids[layout.cu_seqlens_q[i] : layout.cu_seqlens_q[i + 1]].tolist()
        assert key_ids == sequence
        assert query_ids == sequence[len(sequence) - len(query_ids) :]  # the last ones: bottom-right masks
    assert layout.cu_seqlens_q[-1] == layout.length == len(ids)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_unsharing_and_back(seed, sharing):
    rows = _random_rows(seed)
    batch = PackedCollator(sharing, "sequence")(rows)
    ids, layout = batch["input_ids"][0], batch["orpo_layout"]
    unshared = ids[layout.unshare_index]
    positions = batch["position_ids"][0][layout.unshare_index]
    for row, position, sequence in zip(unshared.tolist(), positions.tolist(), _sequences(rows), strict=True):
        assert row[: len(sequence)] == sequence
        assert set(row[len(sequence) :]) <= {sequence[-1]}
        assert position[: len(sequence)] == list(range(len(sequence)))
    assert torch.equal(unshared.flatten()[layout.reshare_index], ids)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_scored_rows_precede_their_targets(seed, sharing):
    rows = _random_rows(seed)
    batch = PackedCollator(sharing, "sequence")(rows)
    ids, layout = batch["input_ids"][0], batch["orpo_layout"]
    expected = []
    for row in rows:
        chosen, rejected = _sequences([row])
        first = len(row["prompt_ids"])
        expected += list(pairwise(chosen))
        expected += list(pairwise(rejected[first - 1 :]))
    assert list(zip(ids[layout.rows].tolist(), layout.targets.tolist(), strict=True)) == expected


def test_moving_keeps_the_object_and_every_tensor_moves():
    layout: PackedLayout = PackedCollator(True, "sequence")(_random_rows(0))["orpo_layout"]
    layout.tokens = torch.tensor(12345.0)
    layout.visibility[1, 1, None] = torch.ones(1, 1)
    assert layout.to("meta") is layout and layout.visibility == {}
    tensors = {name: value for name, value in vars(layout).items() if isinstance(value, torch.Tensor)}
    assert {"rows", "targets", "cu_seqlens_q", "key_index", "unshare_index", "weight", "tokens"} <= set(tensors)
    assert all(value.device.type == "meta" for value in tensors.values())


def test_casts_of_inputs_do_not_see_into_it():
    """DeepSpeed's and accelerate's casts walk dicts, lists, tuples and dataclasses."""
    from torch.distributed.utils import _apply_to_tensors

    layout: PackedLayout = PackedCollator(True, "sequence")(_random_rows(0))["orpo_layout"]
    layout.tokens = torch.tensor(12345.0)
    cast = _apply_to_tensors(lambda tensor: tensor.bfloat16(), {"orpo_layout": layout})
    assert cast["orpo_layout"] is layout and layout.tokens.item() == 12345.0
    assert send_to_device({"orpo_layout": layout}, torch.device("cpu"))["orpo_layout"] is layout
