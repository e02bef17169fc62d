"""One trainer step of each family in the second table of docs/vlm.md against an oracle that shares no code with the
product.

The oracle writes each sequence as the processor's chat template does, runs it alone through a float64 copy of the
model, with what the processor makes of it, and forms the paper's loss from the logits.
"""

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from orpo_dist import ORPOTrainer, UserError
from tests.model.further_vlms import FURTHER, further_vlm, rows_of
from tests.trainer_runs import config

DOCS = Path(__file__).parents[1] / "docs" / "vlm.md"
BETA = 0.1


def families() -> dict[str, str]:
    """Name -> verdict, of the table in the docs."""
    table = DOCS.read_text().split("| family | with images |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \|$", table, re.MULTILINE)
    return {name: verdict.strip() for names, verdict in rows if "---" not in names for name in names.split(", ")}


FAMILIES = families()
EQUAL = [name for name, verdict in FAMILIES.items() if verdict.startswith("equal")]
REFUSED = {
    "Llama 3.2 Vision": "MllamaForConditionalGeneration reads images by cross-attention",
    "BLIP-2": "Blip2Processor puts an image before the text by itself",
    "Fuyu": "FuyuProcessor puts an image before the text by itself",
    "Phi-4-multimodal": "Phi4MultimodalForCausalLM is not among transformers' models for images and text",
}


def built(name: str) -> Any:
    needs = FURTHER[name].needs
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"the tower of {name} lies in {needs}, which `make setup` installs for the tests")
    return further_vlm(name)


class Oracle:
    def __init__(self, name: str, processor: Any, model: Any):
        self.templated, self.processor = FURTHER[name].templated, processor
        self.model = copy.deepcopy(model).double().eval()
        self.model.set_experts_implementation("eager")  # grouped_mm has no float64

    def sequence(self, row: dict[str, Any], side: str) -> tuple[dict[str, Any], int]:
        """The inputs of prompt and answer, and the prompt's length."""
        images = {"images": [row["images"]]} if row["images"] else {}
        if self.templated:
            whole = self.processor.apply_chat_template(row["prompt"] + row[side])
            prompt = self.processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
            assert whole.startswith(prompt)
            extra: dict[str, Any] = {"add_special_tokens": False}
            inputs = self.processor(text=[whole], return_tensors="pt", **images, **extra)
        else:  # PaliGemma
            prompt, extra = row["prompt"], {}
            inputs = self.processor(text=[prompt], suffix=[row[side]], return_tensors="pt", **images)
            inputs.pop("labels")
        begun = self.processor(text=[prompt], return_tensors="pt", **images, **extra)["input_ids"][0]
        assert inputs["input_ids"][0, : len(begun)].tolist() == begun.tolist()
        doubled = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        return doubled, len(begun)

    def step(self, rows: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
        """The paper's loss of the rows as one batch, and its gradients."""
        nll, tokens, preference = torch.zeros(()).double(), 0, torch.zeros(()).double()
        for row in rows:
            means = []
            for side in ("chosen", "rejected"):
                inputs, prompt = self.sequence(row, side)
                ids = inputs["input_ids"][0]
                logits = self.model(**inputs, use_cache=False).logits[0, :-1].double()
                logps = -F.cross_entropy(logits, ids[1:], reduction="none")
                means.append(logps[prompt - 1 :].mean())
                if side == "chosen":
                    nll, tokens = nll - logps.sum(), tokens + len(logps)
            chosen, rejected = means
            odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
            preference = preference + F.logsigmoid(odds)
        loss = nll / tokens - BETA * preference / len(rows)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = {name: p.grad.double() for name, p in kwargs["model"].named_parameters() if p.grad is not None}


def test_the_docs_name_the_families_that_are_tested():
    assert FAMILIES.keys() == FURTHER.keys()
    verdicts = ("equal, packed", "equal, padded", "refused")
    assert all(verdict.split(":")[0] in verdicts for verdict in FAMILIES.values())
    assert {name for name in FAMILIES if name not in EQUAL} == REFUSED.keys()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pairs", [4, 1])
@pytest.mark.parametrize("family", EQUAL)
def test_a_step_is_that_of_the_oracle(family, pairs, tmp_path):
    """In one micro-batch of pairs with and without images, and in one for each pair."""
    processor, model = built(family)
    oracle, rows, seen = Oracle(family, processor, model), rows_of(family), Gradients()
    args = config(
        tmp_path, per_device_train_batch_size=pairs, gradient_accumulation_steps=len(rows) // pairs, max_steps=1,
        max_grad_norm=0.0, beta=BETA, learning_rate=1e-3, train_projector=True, train_vision_tower=True,
    )  # fmt: skip
    trainer = ORPOTrainer(model, args, train_dataset=rows, processing_class=processor, callbacks=[seen])
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    loss, gradients = oracle.step(rows)
    gradients = {name: gradient for name, gradient in gradients.items() if name in trained}
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
    assert not wrong and seen.found.keys() == gradients.keys()
    assert f"equal, {'packed' if trainer.layout.is_packed else 'padded'}" == FAMILIES[family].split(":")[0]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused(family, tmp_path):
    processor, model = built(family)
    with pytest.raises(UserError, match=REFUSED[family]):
        ORPOTrainer(model, config(tmp_path), train_dataset=rows_of(family), processing_class=processor)
