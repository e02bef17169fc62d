"""A SLURM of two nodes, a tiny run, and the weights that it must end with wherever and however it trains."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cluster.workplace import REPOSITORY, SECONDS, STEPS, Slurm, Workplace
from tests.pair_files import write_pairs

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, tiny_llama, plain_tokenizer) -> Workplace:
    folder = tmp_path_factory.mktemp("shared")
    tiny_llama(len(plain_tokenizer)).save_pretrained(folder / "model")
    plain_tokenizer.save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl", 32, seed=1)
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "pairs.jsonl"),
        "max_length": 64,
        "num_train_epochs": STEPS / 8,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        # Plain SGD: adaptive optimizers amplify the rounding in which world sizes differ.
        "optim": "sgd",
        "learning_rate": 0.1,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 5,
        "use_cpu": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    site = (REPOSITORY / "slurm" / "site.sh").read_text()
    site = site.replace('SITE_SHARED_FOLDERS=""', f'SITE_SHARED_FOLDERS="{folder}"')
    # The health check of this site: a file makes a node ill.
    site = site.replace("    # dcgmi health --check\n    :\n", f'    [ ! -e "{folder}/ill.$SLURMD_NODENAME" ]\n')
    assert "ill.$" in site
    (folder / "site.sh").write_text(site)
    environment = {
        **os.environ,
        "ORPO_DIST_SITE": str(folder / "site.sh"),
        "ORPO_DIST_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{HERE / 'hooks'}{os.pathsep}{REPOSITORY}",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "TQDM_DISABLE": "1",
    }
    return Workplace(folder, folder / "recipe.yaml", environment)


@pytest.fixture(scope="session")
def reference(workplace) -> dict[str, torch.Tensor]:
    """The weights of one uninterrupted process."""
    workplace.orpo_dist("train", workplace.recipe, "--output_dir", workplace.folder / "reference")
    return load_file(workplace.folder / "reference" / "model.safetensors")


@pytest.fixture(scope="session")
def slurm(workplace, tmp_path_factory) -> Iterator[Slurm]:
    missing = [
        name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name, path="/usr/sbin:/usr/bin") is None
    ]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"a SLURM of its own needs root and slurm-wlm, munge (missing: {missing}): make test-cluster")
    folder = Path(f"/tmp/orpo-slurm-{os.getpid()}")  # short: munge's socket has a path of 107 characters at most
    script = HERE / "two_nodes.sh"
    subprocess.run([script, "up", folder], check=True, timeout=SECONDS)
    workplace.environment["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield Slurm(workplace)
    finally:
        subprocess.run([script, "down", folder], check=True, timeout=SECONDS)
        shutil.rmtree(folder)
