"""Compares a packed row over several ranks with the whole row: slices_worker SETTINGS.json OUT.json

Settings: `text` and `vision`, names of families; `checks`, of those that the start-up check runs on. Each rank
computes the whole row itself. The errors that are written are the largest over ranks, rows and tensors, relative to the
tensor's own largest entry.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tests.torchvision_ops  # noqa: F401  (before transformers)
from orpo_dist.distributed.agree import first_objection
from orpo_dist.loss import Objective
from orpo_dist.model.attention import interface as attention
from orpo_dist.model.head.install import install_head
from orpo_dist.model.loading.vision import image_rules
from orpo_dist.model.packed.switch import use_packed_layout
from orpo_dist.model.packed.verify_slices import text_rows as text_rows_of_check
from orpo_dist.model.packed.verify_slices import verify_slices
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.exchange import sequence_group
from orpo_dist.packing.images import ImageCollator
from orpo_dist.packing.split import SequencePlace
from tests.model.tiny_models import VOCAB, tiny_model

OBJECTIVE = Objective(beta=0.3)
# P, C, R: several pairs on a rank, one pair over all ranks, ranks without scored rows (completion scope), one filler.
ROWS = {
    "short": [(5, 4, 3), (3, 2, 6), (7, 3, 3), (2, 5, 4), (4, 4, 4)],
    "long": [(6, 17, 21)],
    "long prompt": [(41, 2, 3), (3, 1, 1)],
    "filler": [(1, 1, 1)],
}


def text_rows(lengths: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index, parts in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (sum(parts),), generator=generator).split(parts)
        prompt, chosen, rejected = (part.tolist() for part in ids)
        weight = 0.0 if parts == (1, 1, 1) else 1.0
        rows.append(
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "weight": weight, "index": index}
        )
    return rows


def result(model: Any, batch: dict[str, Any], share: bool) -> dict[str, torch.Tensor]:
    """Loss, scores and gradients; of a split row, those of this rank, summed over all of them."""
    layout = batch["orpo_layout"]
    layout.tokens, layout.pairs = torch.tensor(40.0), torch.tensor(3.0)
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False)
    loss.backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    found = {name: torch.zeros(()) if grad is None else grad.clone() for name, grad in found.items()}
    found["loss"] = loss.detach().clone()
    scores = layout.scores
    for name in ("chosen_logps", "rejected_logps", "nll_sum", "chosen_logits", "rejected_logits"):
        found[name] = getattr(scores, name) * scores.weight
    if share:
        for name in sorted(found):
            dist.all_reduce(found[name])
    return {name: tensor.detach() for name, tensor in found.items()}


def largest_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    overall = max(float(t.abs().max()) for name, t in theirs.items() if name.startswith("gradient"))
    errors = {}
    for name, expected in theirs.items():
        scale = float(expected.abs().max()) + (1e-2 * overall if name.startswith("gradient") else 1e-6)
        errors[name] = float((ours[name] - expected).abs().max()) / max(scale, 1e-9)
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def compare(model: Any, collate: Any, batches: dict[str, list]) -> tuple[float, str]:
    install_head(model, OBJECTIVE, chunk_rows=5)
    verdict = use_packed_layout(model, max_length=128)
    assert verdict.ok, verdict.reason
    worst = (0.0, "")
    for what, rows in batches.items():
        batch = collate(rows)
        layout, split = batch["orpo_layout"], batch["orpo_layout"].split
        layout.split = None
        whole = result(model, batch, share=False)
        layout.split, split.group = split, sequence_group(split.where.size)
        error, name = largest_error(result(model, batch, share=True), whole)
        worst = max(worst, (error, f"{what}: {name}"))
    return worst


def start_up_check(name: str, fault: str, place: SequencePlace) -> str:
    """What the start-up check says of this rank's slice; a fault is in the exchange of one of the two layers."""
    model = tiny_model(name)
    assert use_packed_layout(model, max_length=128).ok
    right, calls = attention.on_whole_rows, []

    def faulty(attend: Any, query: Any, key: Any, value: Any, split: Any, sinks: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) % 2 or not fault:
            return right(attend, query, key, value, split, sinks)
        if fault == "heads in another order":
            return right(attend, query, key.flip(1), value.flip(1), split, sinks)
        if fault == "tokens of a neighbour":
            return right(attend, query, key.roll(1, 2), value, split, sinks)
        return attend(*(split_alone(x, split) for x in (query, key, value)), sinks)[:, : split.width]

    attention.on_whole_rows = faulty
    try:
        batch = PackedCollator(True, "sequence", place)(text_rows_of_check(model))
        check = verify_slices(model, batch, max_length=128)
    finally:
        attention.on_whole_rows = right
    return first_objection(check.reason)


def split_alone(x: torch.Tensor, split: Any) -> torch.Tensor:
    """The slice in place of the whole row: no exchange at all."""
    return torch.cat([x] * split.where.size, 2)[:, :, : split.length]


def main() -> None:
    settings, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    dist.init_process_group("gloo")
    place = SequencePlace(dist.get_world_size(), dist.get_rank())
    found: dict[str, Any] = {}
    for name in settings["text"]:
        for scope, sharing in (("sequence", True), ("completion", True), ("sequence", False)):
            model = tiny_model(name)
            if scope == "completion":
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            collate = PackedCollator(sharing, scope, place)
            batches = {what: text_rows(lengths) for what, lengths in ROWS.items()}
            found[f"{name}, {scope}, {'shared' if sharing else 'twice'}"] = compare(model, collate, batches)
    for name in settings["vision"]:
        from tests.model.tiny_vlms import image_rows, tiny_processor, tiny_vlm

        model = tiny_vlm(name)
        collate = ImageCollator(PackedCollator(True, "sequence", place), tiny_processor(name), image_rules(model))
        found[name] = compare(
            model, collate, {"images": [{**row, "weight": 1.0, "index": i} for i, row in enumerate(image_rows(name))]}
        )
    for name in settings.get("checks", []):
        for fault in ("", "heads in another order", "tokens of a neighbour", "no exchange"):
            found[f"check of {name}: {fault}"] = start_up_check(name, fault, place)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
