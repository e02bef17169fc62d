"""The site profile: what it cannot be, and folders that nodes do not share."""

from dataclasses import replace
from pathlib import Path

import pytest

from orpo_dist.cluster.files import shipped
from orpo_dist.cluster.site import read_site
from orpo_dist.errors import UserError


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


@pytest.mark.parametrize(
    "text",
    [
        "SITE_PARTITION=gpu",
        "SITE_PARTITION=gpu\n[ -d /nowhere ] && SITE_SCRATCH=/nowhere\n",
        "echo hello\nSITE_PARTITION=gpu\nread -r answer\n",
        "set -u\nSITE_PARTITION=gpu\n",
        "module load cuda 2>/dev/null\nSITE_PARTITION=gpu # é\n",
    ],
)
def test_profiles_that_are_right(tmp_path, text):
    (tmp_path / "site.sh").write_text(text)
    assert read_site(str(tmp_path / "site.sh")).partition == "gpu"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"SITE_PARTITION=gpu\r\nsite_setup() {\r\n:\r\n}\r\n", "has line ends of Windows"),
        (b"SITE_PARTITION=\xff\xfe\n", "is not a text file in UTF-8"),
        (b"site_setup() {\n", "bash cannot read it: .*unexpected end of file"),
        (b"exit 0\n", r"bash cannot read it: it ends the shell \(exit, set -e\)"),
        (b"set -e\nfalse\n", "it ends the shell"),
        (b"source /nowhere/modules.sh\n", "bash cannot read it: .*/nowhere/modules.sh: No such file"),
        (b"sleep 60\n", "takes longer than 0.5 s"),
    ],
)
def test_profiles_that_are_refused_in_one_line(tmp_path, monkeypatch, content, said):
    monkeypatch.setattr("orpo_dist.cluster.site.SECONDS", 0.5 if b"sleep" in content else 60)
    (tmp_path / "site.sh").write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        read_site(str(tmp_path / "site.sh"))
    assert "\n" not in str(refused.value)
