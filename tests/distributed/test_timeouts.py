"""The timeout of collectives, on a process group of one rank, in a process of its own."""

import subprocess
import sys

from orpo_dist.distributed.timeouts import collectives_may_take

PROGRAM = """
from datetime import timedelta
import torch
from torch import distributed
from orpo_dist.distributed.timeouts import BACKGROUND, collectives_may_take

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
groups = [distributed.group.WORLD, distributed.new_group([0]), distributed.new_group([0], group_desc=BACKGROUND)]

def seconds():
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]

assert seconds() == [1800, 1800, 1800], seconds()
collectives_may_take(7.5)
assert seconds() == [7.5, 7.5, 1800], seconds()
"""


def test_every_group_gets_the_timeout_but_that_of_background_work():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_process_group_it_does_nothing():
    collectives_may_take(1)
