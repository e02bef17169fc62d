"""No GPU and no token, whatever this machine has."""

import pytest

from orpo_dist.autotrain import local as autotrain_launch


@pytest.fixture(autouse=True)
def clean_machine(monkeypatch):
    """No GPU and no token, whatever this machine has."""
    for name in ("HF_TOKEN", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(autotrain_launch, "gpu_count", lambda: 0)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
