"""The options of a model, and the precision of its weights that follows from them."""

import pytest
import torch

from orpo_dist.options.model import ModelArguments, resolve_dtype


@pytest.mark.parametrize(
    ("arguments", "precision", "expected"),
    [
        ({}, {"bf16": True}, torch.float32),
        ({}, {"fp16": True}, torch.float32),
        ({"use_peft": True}, {"bf16": True}, torch.bfloat16),
        ({"use_peft": True}, {"fp16": True}, torch.float16),
        ({"use_peft": True}, {}, torch.float32),
        ({"adapter_name_or_path": "a"}, {"bf16": True}, torch.bfloat16),
        ({"dtype": "bfloat16"}, {}, torch.bfloat16),
        ({"dtype": "float16", "use_peft": True}, {}, torch.float16),
        ({"dtype": "auto"}, {"bf16": True}, "auto"),
    ],
)
def test_precision_of_the_weights(arguments, precision, expected):
    assert resolve_dtype(ModelArguments("m", **arguments), **precision) == expected
