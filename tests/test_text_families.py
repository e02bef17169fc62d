"""One trainer step of each text family in docs/families.md against an oracle that shares no code with the product.

The oracle runs every sequence alone, unpadded, in a float64 copy of the model, and forms the loss from its logits.
"""

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from orpo_dist import ORPOTrainer
from tests.model.text_families import VOCAB, text_family
from tests.trainer_runs import config

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
LENGTHS = ((11, 7, 9), (5, 6, 3), (1, 1, 4), (8, 10, 1))  # P, C, R, beyond the windows of 6 and down to one token
BETA = 0.1


def families() -> dict[str, str]:
    """model_type -> layout, of the table in the docs."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", DOCS.read_text(), re.MULTILINE)
    return {name: layout.strip() for name, layout in rows}


FAMILIES = families()


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for lengths in LENGTHS:
        ids = torch.randint(4, VOCAB, (sum(lengths),), generator=generator)
        prompt, chosen, rejected = (part.tolist() for part in ids.split(lengths))
        found.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return found


def oracle(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The paper's loss of the rows as one batch, and its gradients."""
    model = copy.deepcopy(model).double().eval()
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    nll, tokens, preference = torch.zeros(()).double(), 0, torch.zeros(()).double()
    for row in rows():
        means = []
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
            logps = -F.cross_entropy(logits, ids[0, 1:], reduction="none")
            means.append(logps[len(row["prompt_ids"]) - 1 :].mean())
            if side == "chosen_ids":
                nll, tokens = nll - logps.sum(), tokens + len(logps)
        chosen, rejected = means
        odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
        preference = preference + F.logsigmoid(odds)
    loss = nll / tokens - BETA * preference / len(LENGTHS)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = {name: p.grad.double() for name, p in kwargs["model"].named_parameters() if p.grad is not None}


def test_the_docs_name_forty_families():
    assert len(FAMILIES) >= 40 and set(FAMILIES.values()) <= {"packed", "packed, unshared mixers", "padded"}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_the_oracle(family, tmp_path, chat_tokenizer, caplog):
    model = text_family(family)
    loss, gradients = oracle(model)
    seen = Gradients()
    args = config(
        tmp_path, per_device_train_batch_size=len(LENGTHS), max_steps=1, max_grad_norm=0.0, max_length=64, beta=BETA,
        learning_rate=1e-3,
    )  # fmt: skip
    caplog.set_level(logging.INFO, "orpo_dist")
    trainer = ORPOTrainer(model, args, train_dataset=rows(), processing_class=chat_tokenizer, callbacks=[seen])
    trainer.train()
    unshared = ", unshared mixers" if "run on unshared rows" in caplog.text else ""
    assert (f"packed{unshared}" if trainer.layout.is_packed else "padded") == FAMILIES[family]
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert abs(logged - loss) <= 1e-6 * abs(loss)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    wrong = {}
    for name, expected in gradients.items():
        # A tensor whose gradient is a small sum of large terms is held to what float32 resolves of the largest one.
        scale = max(expected.abs().max().item(), 1e-3 * largest)
        difference = (seen.found[name] - expected).abs().max().item() / scale
        if difference > 5e-5:
            wrong[name] = difference
    assert not wrong
