"""One rank of a run in the kill campaign: the command line, with real FSDP2 sharding on a CPU (see fsdp_on_cpu.py)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "topologies"))

if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
    import fsdp_on_cpu

    fsdp_on_cpu.enable()

from orpo_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
