"""AutoTrain's parameters, project class and flags, as runs of `orpo-dist train`."""

from orpo_dist.autotrain.params import LLMTrainingParams
from orpo_dist.autotrain.project import AutoTrainProject

__all__ = ["AutoTrainProject", "LLMTrainingParams"]
