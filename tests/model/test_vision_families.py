"""Packed and padded layouts with images give the loss and gradients of the model's own forward, family by family.

The oracle runs the family's processor over prompts and images twice, as TRL's concatenated forward would, and leaves
positions and masks to the model.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from orpo_dist.loss import Objective, orpo_loss
from orpo_dist.model.head.install import install_head
from orpo_dist.model.loading.vision import features_for_both, image_rules, vision_parts
from orpo_dist.model.packed.switch import use_packed_layout
from orpo_dist.model.packed.verify_images import verify_images
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.images import ImageCollator
from orpo_dist.packing.padded import PaddedCollator, score_padded
from tests.model.packing_reference import Result
from tests.model.tiny_vlms import FAMILIES, image_rows, tiny_processor, tiny_vlm

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
OBJECTIVE = Objective(beta=1.0)


def photographs() -> list[Image.Image]:
    """The two of scikit-learn, small and of unequal shape."""
    china, flower = (Image.fromarray(np.asarray(image)) for image in load_sample_images().images)
    return [china.resize((64, 43)), flower.crop((100, 0, 300, 400)).resize((24, 48))]


def rows_of(name: str) -> list[dict]:
    rows = image_rows(name, photographs())
    return [{**row, "weight": 1.0, "index": i} for i, row in enumerate(rows)]


def own_forward(model, name: str, rows: list[dict]) -> Result:
    """What the model makes of the processor's tensors for [all chosen rows, all rejected rows]."""
    processor = tiny_processor(name)
    batch = PaddedCollator(0, "sequence")(rows)
    layout = batch.pop("orpo_layout")
    illustrated = [row for row in rows if row["images"]] * 2
    made = processor(
        text=[row["prompt_text"] for row in illustrated],
        images=[[Image.open(io.BytesIO(image["bytes"])) for image in row["images"]] for row in illustrated],
        padding=True,
        return_tensors="pt",
    )
    for kind in ("mm_token_type_ids", "token_type_ids"):
        if kind in made:
            batch[kind] = torch.full_like(batch["input_ids"], 1 if name == "paligemma" else 0)
            found = iter(types[mask.bool()] for types, mask in zip(made[kind], made["attention_mask"], strict=True))
            for i, row in enumerate(rows * 2):
                prompt = len(row["prompt_ids"])
                batch[kind][i, :prompt] = next(found) if row["images"] else 0
    for tensor, value in made.items():
        if tensor not in ("input_ids", "attention_mask", "labels", "mm_token_type_ids", "token_type_ids"):
            batch[tensor] = value
    logits = model(**batch, use_cache=False).logits
    counts = layout.counts().float()
    return backward(model, orpo_loss(score_padded(logits, layout), OBJECTIVE, counts[0], counts[1]))


def backward(model, loss: torch.Tensor) -> Result:
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Result(loss.detach(), gradients)


def assert_equal(ours: Result, theirs: Result) -> None:
    """Per tensor max|difference| <= 1e-5 * max|gradient|, with room for the gradients of key biases: they are sums of
    terms that cancel, nothing but the rounding of the others."""
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    assert ours.gradients.keys() == theirs.gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.gradients.values())
    wrong = {}
    for name, expected in theirs.gradients.items():
        difference = (ours.gradients[name] - expected).abs().max().item()
        if difference > 1e-5 * expected.abs().max().item() + 1e-7 * largest:
            wrong[name] = (difference, expected.abs().max().item())
    assert not wrong, f"gradients differ (difference, largest): {wrong}"


def collator(name: str, model, layout, **options) -> ImageCollator:
    return ImageCollator(layout, tiny_processor(name), image_rules(model), **options)


def packed_forward(model, name: str, rows: list[dict]) -> Result:
    install_head(model, OBJECTIVE)
    verdict = use_packed_layout(model, max_length=1024)
    assert verdict.ok, verdict.reason
    batch = collator(name, model, PackedCollator(True, "sequence"))(rows)
    layout = batch["orpo_layout"]
    layout.tokens, layout.pairs = layout.counts().float().unbind()
    result = backward(model, model(**batch, use_cache=False))
    verdict.restore()
    return result


def padded_forward(model, name: str, rows: list[dict]) -> Result:
    batch = collator(name, model, PaddedCollator(0, "sequence"))(rows)
    layout = batch.pop("orpo_layout")
    with features_for_both(model):
        logits = model(**batch, use_cache=False).logits
    counts = layout.counts().float()
    return backward(model, orpo_loss(score_padded(logits, layout), OBJECTIVE, counts[0], counts[1]))


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_equal_the_models_own_forward(name):
    model, rows = tiny_vlm(name), rows_of(name)
    expected = own_forward(model, name, rows)
    tower = [p for p in expected.gradients if any(p.startswith(part) for part in vision_parts(model).tower)]
    assert tower and all(expected.gradients[p].abs().max() > 0 for p in tower[:3])
    assert_equal(padded_forward(model, name, rows), expected)
    assert_equal(packed_forward(model, name, rows), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name):
    model, rows = tiny_vlm(name), rows_of(name)[:3]
    expected = own_forward(model, name, rows)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(packed_forward(model, name, rows), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_without_images(name):
    model, rows = tiny_vlm(name), [rows_of(name)[2]]
    batch = PaddedCollator(0, "sequence")(rows)
    layout = batch.pop("orpo_layout")
    if name == "paligemma":
        batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
        batch["token_type_ids"][:, : len(rows[0]["prompt_ids"])] = 0
    logits = model(**batch, use_cache=False).logits
    counts = layout.counts().float()
    expected = backward(model, orpo_loss(score_padded(logits, layout), OBJECTIVE, counts[0], counts[1]))
    assert_equal(packed_forward(model, name, rows), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_pass_the_tower_once_per_pair(name):
    """Counted at the tower's first convolution or patch embedding: in every layout the pixels of one set of prompts."""
    model, rows = tiny_vlm(name), rows_of(name)
    seen: list[int] = []
    tower = model.get_encoder(modality="image")
    embedding = next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
    embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    packed_forward(model, name, rows)
    padded_forward(model, name, rows)
    own_forward(model, name, rows)
    packed, padded, twice = seen
    assert packed == padded == twice // 2


@pytest.mark.parametrize("name", FAMILIES)
def test_start_up_check_passes(name):
    model = tiny_vlm(name)
    install_head(model, OBJECTIVE)
    verdict = use_packed_layout(model, max_length=1024)
    packed = collator(name, model, PackedCollator(True, "sequence"))
    example = image_rows(name)[1]
    check = verify_images(model, packed, example, verdict)
    assert check.ok, check.reason
    verdict.restore()
    check = verify_images(model, collator(name, model, PaddedCollator(0, "sequence")), example, None)
    assert check.ok, check.reason


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("shapes differ")])
def test_a_full_memory_is_not_a_wrong_layout(failure):
    model = tiny_vlm("llava").eval()
    verdict = use_packed_layout(model, max_length=1024)

    def fail(module, args, kwargs):
        if kwargs.get("orpo_layout") is not None:
            raise failure

    model.get_decoder().register_forward_pre_hook(fail, with_kwargs=True)
    packed = collator("llava", model, PackedCollator(True, "sequence"))
    if isinstance(failure, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            verify_images(model, packed, image_rows("llava")[1], verdict)
    else:
        assert not verify_images(model, packed, image_rows("llava")[1], verdict).ok
