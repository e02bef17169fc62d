"""The files that travel with the package."""

from orpo_dist.cluster.files import accelerate_config, shipped


def test_shipped_files_exist():
    assert accelerate_config("zero2").name == "zero2.yaml"
    assert shipped("slurm", "lib.sh").is_file()
