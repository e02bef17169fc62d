"""Where tokens stand in either layout, and what a comparison of layouts reads from them."""

import pytest
import torch

from orpo_dist.model.packed.stations import GAIN, TokenMap, compare_layouts
from orpo_dist.model.packed.switch import use_packed_layout
from orpo_dist.model.packed.verify import run
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.layout import PackedLayoutError
from orpo_dist.packing.padded import PaddedCollator
from tests.model.packing_reference import rows
from tests.model.tiny_models import tiny_model


@pytest.mark.parametrize("sharing", [True, False])
def test_tokens_are_found_in_both_layouts(sharing):
    """With the token ids as states, the same distinct tokens come out of either."""
    packed, padded = PackedCollator(sharing, "sequence")(rows()), PaddedCollator(0, "sequence")(rows())
    layout, ids = packed["orpo_layout"], padded["input_ids"]
    ours, theirs = TokenMap.packed(layout), TokenMap.padded(layout, tuple(ids.shape))
    distinct = [row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"] for row in rows()]
    flat = torch.tensor([token for pair in distinct for token in pair])
    for where, tokens in ((ours, packed["input_ids"]), (theirs, ids)):
        assert torch.equal(tokens.flatten()[where.place], flat)
        assert torch.equal(tokens.flatten()[where.seen], flat[where.token])
        assert sum(where.sizes) == len(where.seen)
    assert len(ours.seen) == layout.length and len(theirs.seen) == padded["attention_mask"].sum()


class Comparing:
    """Four pairs, the second half as the first, through a tiny model in either layout."""

    def __init__(self, family: str):
        self.model = tiny_model(family).eval()
        self.verdict = use_packed_layout(self.model, max_length=64)
        half = rows(lengths=((7, 5, 6), (7, 5, 6)))
        pairs = [*half, *half]
        self.packed, self.padded = PackedCollator(True, "sequence")(pairs), PaddedCollator(0, "sequence")(pairs)
        del self.padded["orpo_layout"]

    def __call__(self, packed=None):
        def reference():
            with self.verdict.paused():
                run(self.model, self.model, self.padded)

        with torch.no_grad():
            return compare_layouts(
                self.model,
                reference,
                packed or (lambda: run(self.model, self.model, self.packed)),
                layout=self.packed["orpo_layout"],
                padded=tuple(self.padded["input_ids"].shape),
                packed=True,
                unit=2**-23,
                amplified=True,
            )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bamba", "qwen3_moe"])
def test_right_layouts_are_within_the_noise(family):
    found = Comparing(family)()
    assert 0 <= found.difference < found.tolerance < 1e-4


def test_the_layer_at_fault_is_named():
    comparing = Comparing("llama")
    layer = comparing.model.model.layers[1]
    handle = layer.mlp.register_forward_hook(lambda module, args, out: out.roll(1, 1) if len(out) == 1 else out)
    found = comparing()
    assert found.worst == "the model (last states)" and found.difference > found.tolerance
    handle.remove()
    layer.input_layernorm.register_forward_hook(lambda module, args, out: out.roll(1, 1) if len(out) == 1 else out)
    assert comparing().worst == "layers.1.self_attn (mixer's input)"


def test_a_token_that_one_pair_alone_shows_is_rounding():
    """As an expert that rounding has chosen in one pair."""
    comparing = Comparing("qwen3_moe")

    def other_expert(module, args, out):
        if len(out) == 1:
            out = out.clone()
            out[0, 3] *= 2
        return out

    comparing.model.model.layers[0].mlp.register_forward_hook(other_expert)
    found = comparing()
    assert found.difference < found.tolerance


def test_positions_count_relative_to_each_other():
    comparing = Comparing("llama")
    comparing.packed["position_ids"] = comparing.packed["position_ids"] + 1
    found = comparing()
    assert found.difference < found.tolerance
    comparing.packed["position_ids"] = comparing.packed["position_ids"] * 2
    found = comparing()
    assert found.worst.endswith("self_attn (mixer's output)") and found.difference > found.tolerance


def test_overflow_of_amplified_rows_is_no_fault():
    comparing = Comparing("llama")

    def overflows(module, args, out):
        out = out.clone()
        out[args[0].abs().amax(-1) > GAIN] = torch.inf
        return out

    comparing.model.model.layers[0].self_attn.o_proj.register_forward_hook(overflows)
    found = comparing()
    assert found.difference < found.tolerance


def test_another_way_through_the_model_is_refused():
    comparing = Comparing("llama")
    layers = comparing.model.model.layers
    with pytest.raises(PackedLayoutError, match="does not reach"):
        comparing(lambda: None)

    def twice():
        run(comparing.model, comparing.model, comparing.packed)
        run(comparing.model, comparing.model, comparing.packed)

    with pytest.raises(PackedLayoutError, match="which that of padded rows does not"):
        comparing(twice)
    assert not any(layer._forward_pre_hooks for layer in layers)
