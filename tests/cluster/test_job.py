"""What a job asks SLURM for, and what is refused before it is submitted."""

from dataclasses import replace

import pytest

from orpo_dist.cluster.job import JobRequest, check_request, seconds_of
from orpo_dist.errors import UserError

PLAIN = JobRequest("orpo-mine")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": 0}, "--nodes 0: must be at least 1"),
        ({"gpus": 4, "processes": 8}, "one GPU per process"),
        ({"time": "00:10:00", "stop_before": 600}, "too short: the run stops 600 s before its end"),
        ({"time": "soon"}, "--time soon: write it as SLURM does"),
        ({"template": "nodes"}, "the templates are single_node, multi_node"),
        ({"template": "single_node", "nodes": 2}, "use multi_node"),
        ({"container_runtime": "docker"}, "pyxis or apptainer"),
    ],
)
def test_refused_requests(changes, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        check_request(replace(PLAIN, **changes))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("3:30", 210), ("1:02:03", 3723), ("2-12", 216000), ("1-00:30", 88200), ("1-00:00:01", 86401)],
)
def test_times(time, seconds):
    assert seconds_of(time) == seconds
