"""One rank of a run in which rank 1 comes to harm: dying.py HARM train RECIPE.yaml

HARM: raise, kill, hang, oom (in step 3), nan (from step 3 on).
"""

import os
import signal
import sys
import time

import torch

from orpo_dist.cli import main
from orpo_dist.trainer import ORPOTrainer
from orpo_dist.training.step_guard import StepGuard

HARM = sys.argv[1]
compute_loss = ORPOTrainer.compute_loss
slept = []


def harmed(self, model, inputs, *args, **kwargs):
    if self.args.process_index == 1:
        if HARM == "hang" and not slept:
            slept.append(True)
            time.sleep(20)  # longer than ddp_timeout: before the first step that is allowed
        if self.state.global_step == 2:
            if HARM == "raise":
                raise RuntimeError("broken on purpose")
            if HARM == "oom":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            if HARM == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if HARM == "hang":
                time.sleep(10_000)
        if HARM == "nan" and self.state.global_step >= 2:
            guard = self._step_guard
            guard.count = lambda loss: StepGuard.count(guard, loss + float("inf"))
    return compute_loss(self, model, inputs, *args, **kwargs)


ORPOTrainer.compute_loss = harmed

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
