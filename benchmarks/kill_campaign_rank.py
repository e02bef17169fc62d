"""One rank of a run in the kill campaign: the command line, with real FSDP2 sharding on a CPU. It prints a line at the
beginning of each last act.

kill_campaign.py starts it with the repository on PYTHONPATH; see tests/launching/fsdp_on_cpu.py.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
    from tests.launching import fsdp_on_cpu

    fsdp_on_cpu.enable()

from orpo_dist import train
from orpo_dist.cli import main
from orpo_dist.model.loading import merge
from orpo_dist.run.summary import RunSummary
from orpo_dist.trainer import ORPOTrainer


def announce(owner: Any, name: str, act: str) -> None:
    work: Callable[..., Any] = getattr(owner, name)

    def announced(*args: Any, **kwargs: Any) -> Any:
        print(f"last act: {act}", flush=True)
        return work(*args, **kwargs)

    setattr(owner, name, announced)


announce(train, "_save_model", "save")
announce(merge, "merge_run", "merge")
announce(ORPOTrainer, "create_model_card", "card")
announce(RunSummary, "save", "summary")

if __name__ == "__main__":
    sys.exit(main())
