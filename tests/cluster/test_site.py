"""The site profile: what it cannot be, and folders that nodes do not share."""

from dataclasses import replace
from pathlib import Path

import pytest

from orpo_dist.cluster.files import shipped
from orpo_dist.cluster.site import read_site


@pytest.mark.parametrize(
    ("shared", "folder", "refusal"),
    [
        ("", "/home/me/run", None),
        ("", "/tmp/run", "is on /tmp, which is local to each node"),
        ("", "/tmpfs/run", None),
        ("/shared /gpfs", "/gpfs/run", None),
        ("/shared /gpfs", "/home/me/run", "is in none of the shared folders of the site profile (/shared /gpfs)"),
        ("/tmp/all", "/tmp/all/run", None),
    ],
)
def test_folders_that_nodes_do_not_share(shared, folder, refusal):
    assert (
        replace(read_site(str(shipped("slurm", "site.sh"))), shared_folders=shared).refusal_of(Path(folder)) == refusal
    )
