"""One rank of a run of which a rank is stopped by SIGSTOP in a phase: stopped.py PHASE RANK train RECIPE.yaml

PHASE: step, save, evaluation, last_act. All but the last happen in or after step 2.
"""

import os
import signal
import sys

from orpo_dist.cli import main
from orpo_dist.trainer import ORPOTrainer

PHASE, RANK = sys.argv[1], int(sys.argv[2])
METHODS = {
    "step": "compute_loss",
    "save": "_save_rng_state",
    "evaluation": "prediction_step",
    "last_act": "create_model_card",
}
method = getattr(ORPOTrainer, METHODS[PHASE])


def stopped(self, *args, **kwargs):
    if self.args.process_index == RANK and self.state.global_step >= 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    return method(self, *args, **kwargs)


setattr(ORPOTrainer, METHODS[PHASE], stopped)

if __name__ == "__main__":
    sys.exit(main(sys.argv[3:]))
