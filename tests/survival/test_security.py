"""A checkpoint is data: loading it runs no code that somebody put there."""

import pickle

import pytest
import torch

from orpo_dist.distributed.zero import safe_pickles


class Attack:
    def __reduce__(self):
        return print, ("code of the checkpoint has run",)


@pytest.fixture
def poisoned(tmp_path):
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Attack()}, path)
    return path


def test_a_poisoned_partition_is_refused_where_deepspeed_would_load_it(poisoned, capsys):
    deepspeed = pytest.importorskip("deepspeed")
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    engine = TorchCheckpointEngine()
    engine.load(str(poisoned))
    assert "code of the checkpoint has run" in capsys.readouterr().out  # what DeepSpeed alone does
    with safe_pickles(), pytest.raises(pickle.UnpicklingError):
        engine.load(str(poisoned))
    assert "code of the checkpoint has run" not in capsys.readouterr().out
    assert deepspeed.__version__


def test_what_deepspeed_saves_loads(tmp_path):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    path = tmp_path / "states.pt"
    torch.save({"loss_scaler": LossScaler(1.0), "zero_stage": ZeroStageEnum.gradients, "step": torch.ones(())}, path)
    with safe_pickles():
        assert torch.load(path, weights_only=False)["zero_stage"] == 2
