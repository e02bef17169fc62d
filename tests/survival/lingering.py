"""One rank of a run whose rank 0 is slow or fails in a last act: lingering.py HOW ACT train RECIPE.yaml

HOW: slow (longer than ddp_timeout) or fail. ACT: save, merge, card.
"""

import sys
import time

from orpo_dist import train as orpo_train
from orpo_dist.cli import main
from orpo_dist.model.loading import merge
from orpo_dist.trainer import ORPOTrainer

HOW, ACT = sys.argv[1:3]


def spoiled(work):
    def act(*args, **kwargs):
        if _is_first():
            if HOW == "fail":
                raise RuntimeError("broken on purpose")
            time.sleep(25)
        return work(*args, **kwargs)

    return act


def _is_first() -> bool:
    from torch import distributed

    return distributed.get_rank() == 0


if ACT == "save":
    orpo_train._save_model = spoiled(orpo_train._save_model)
elif ACT == "merge":
    merge.merge_run = spoiled(merge.merge_run)
else:
    ORPOTrainer.create_model_card = spoiled(ORPOTrainer.create_model_card)

if __name__ == "__main__":
    sys.exit(main(sys.argv[3:]))
