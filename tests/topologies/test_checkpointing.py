"""Gradient checkpointing of an adapter, with and without reentrance, trains like one process without checkpointing."""

import pytest

from tests.topologies.runs import GENTLE_SPLIT, LORA, assert_same, run


@pytest.mark.topology
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("launcher", ["torchrun", "zero3"])
def test_checkpointed_adapter(setting, lora_reference, launcher, reentrant):
    kwargs = {"use_reentrant": reentrant}
    config = {**GENTLE_SPLIT, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    outcome = run(setting, f"{launcher}_{reentrant}", config, launcher, lora=LORA)
    assert_same(outcome, lora_reference)
