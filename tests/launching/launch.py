"""Start a worker under a launcher and read back what it wrote."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "accelerate_configs"


@dataclass(frozen=True)
class Outcome:
    log: list[dict]
    facts: dict
    weights: dict[str, torch.Tensor]
    saved: Path


def run_worker(
    settings: dict,
    out: Path,
    launcher: str | None = None,
    processes: int = 2,
    worker: str = "worker",
    launcher_changes: dict | None = None,
):
    """launcher: None for one process, "torchrun", or the name of an accelerate config; worker: a module of this
    package; launcher_changes: to a section of the accelerate config."""
    out.with_suffix(".json").write_text(json.dumps(settings))
    module = ["-m", f"tests.launching.{worker}", str(out.with_suffix(".json")), str(out)]
    if launcher is None:
        command = [sys.executable, *module]
    elif launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += module
    else:
        config = yaml.safe_load((CONFIGS / f"{launcher}.yaml").read_text())
        for section, changes in (launcher_changes or {}).items():
            config[section] |= changes
        on_cpu = out.with_suffix(".accelerate.yaml")  # the flag --cpu would start one plain process
        on_cpu.write_text(yaml.safe_dump({**config, "use_cpu": True, "num_processes": processes}))
        command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={on_cpu}"]
        command += ["--main_process_port=0", *module]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    saved = Path(f"{out}.saved")
    weights = {}
    for file in sorted(saved.glob("*.safetensors")):
        weights |= load_file(file)
    written = json.loads(out.read_text())
    return Outcome(written["log"], written["facts"], weights, saved)
