"""One rank of a run in the kill campaign: the command line, with real FSDP2 sharding on a CPU.

kill_campaign.py starts it with the repository on PYTHONPATH; see tests/launching/fsdp_on_cpu.py.
"""

import os
import sys

if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
    from tests.launching import fsdp_on_cpu

    fsdp_on_cpu.enable()

from orpo_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
