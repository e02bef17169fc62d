"""Warnings come once per run: from the first rank, with or without a process group."""

import logging
import os
import subprocess
import sys

import pytest
from torch import distributed

from orpo_dist.distributed.log import get_logger

SCRIPT = """
from orpo_dist.distributed.log import get_logger
get_logger("orpo_dist.model").warning("Padded layout: %s.", "a reason")
"""


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0)])
def test_first_rank_alone_prints(rank, lines):
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    if rank is not None:
        environment["RANK"] = rank
    process = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("Padded layout: a reason.") == lines


def test_record_has_name_and_place_of_the_caller(caplog, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    get_logger("orpo_dist.somewhere").warning("%d of %s", 2, "three")
    (record,) = caplog.records
    assert (record.name, record.getMessage()) == ("orpo_dist.somewhere", "2 of three")
    assert record.filename == "test_log.py"


def test_process_group_wins_over_the_environment(caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    logger = get_logger("orpo_dist.somewhere")
    logger.warning("before")
    distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", world_size=1, rank=0)
    try:
        logger.warning("within")
    finally:
        distributed.destroy_process_group()
    assert [record.getMessage() for record in caplog.records] == ["within"]
    assert not logger.isEnabledFor(logging.ERROR)
