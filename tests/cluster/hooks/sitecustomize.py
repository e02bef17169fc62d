"""On PYTHONPATH of test jobs: FSDP2 made real on the CPU, and a gate at which a run waits to be interrupted.

ORPO_TEST_GATE=12: after its 12th step a run waits for its stop file, or for the end, in a job that was never restarted.
"""

import os
import time
from pathlib import Path

GATE_SECONDS = 1800

if "RANK" in os.environ and os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from tests.launching import fsdp_on_cpu

    fsdp_on_cpu.enable()

if "RANK" in os.environ and "ORPO_TEST_GATE" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    from transformers import TrainerCallback, trainer

    class Gate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step != int(os.environ["ORPO_TEST_GATE"]):
                return
            folder = Path(args.output_dir)
            (folder / f"at_gate.{os.environ['RANK']}").touch()
            deadline = time.monotonic() + GATE_SECONDS
            while not (folder / "STOP").exists() and time.monotonic() < deadline:
                time.sleep(0.2)

    trainer.DEFAULT_CALLBACKS.append(Gate)
