"""Timeouts of collectives: long during start-up, `ddp_timeout` after the first step.

Loading a model from a slow disk and the first step, which compiles, differ between ranks by minutes; later steps do
not. These timeouts do not apply to tokenisation: ranks wait for it outside of collectives (distributed/once.py).
"""

from datetime import timedelta

from torch import distributed
from torch.distributed import distributed_c10d

START_SECONDS = 2 * 60 * 60
BACKGROUND = "orpo_dist background"  # the description of a group whose timeout stays (distributed/together.py)


def collectives_may_take(seconds: float) -> None:
    """From now on a collective of any process group of this rank, that of background work aside, fails after
    `seconds`."""
    if not distributed.is_initialized():
        return
    # torch has no public name for either. https://github.com/pytorch/pytorch (distributed_c10d.py, _set_pg_timeout)
    for group in list(distributed_c10d._world.pg_map):
        if group.group_desc != BACKGROUND:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
