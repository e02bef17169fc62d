"""Nodes meet before a run: what cannot work ends in a sentence, in bounded time."""

import socket
import threading
import time
from dataclasses import replace

import pytest

from orpo_dist.cluster import rendezvous
from orpo_dist.cluster.rendezvous import NodeReport, meet
from orpo_dist.errors import UserError

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}
HEAD = NodeReport(0, 2, 4, "n1", VERSIONS, "recipe")
OTHER = replace(HEAD, node_rank=1, host="n2")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def attend(reports, port, folder, seconds=20.0) -> dict[int, str | None]:
    """All nodes meet, a thread each. Returns what each was told, by position; None: all is well."""
    told: dict[int, str | None] = {}

    def one(position, report):
        try:
            meet(report, "localhost", port, folder, seconds)
            told[position] = None
        except UserError as error:
            told[position] = str(error)

    threads = [threading.Thread(target=one, args=item, daemon=True) for item in enumerate(reports)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(told) == len(reports), "a node waits for ever"
    return told


def test_three_nodes_meet_and_leave_nothing_behind(port, tmp_path):
    nodes = [replace(HEAD, nodes=3), replace(OTHER, nodes=3), replace(OTHER, nodes=3, node_rank=2, host="n3")]
    assert attend(nodes, port, tmp_path) == {0: None, 1: None, 2: None}
    assert list(tmp_path.iterdir()) == []
    with socket.create_server(("", port)):  # the process group can have it
        pass


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(OTHER, nodes=3), "node rank 1 (n2) was started for 3 nodes, the head (n1) for 2"),
        (replace(OTHER, node_rank=2), "with 2 nodes the node ranks are 0 to 1"),
        (replace(OTHER, processes=8), "node rank 1 (n2) starts 8 processes, the head (n1) 4"),
        (replace(OTHER, versions=VERSIONS | {"torch": "2.12.0"}), "torch 2.12.0 against 2.13.0"),
        (replace(OTHER, recipe="another"), "another recipe or other flags"),
    ],
)
def test_a_node_that_differs_is_named_on_both_sides(port, tmp_path, other, said):
    told = attend([HEAD, other], port, tmp_path)
    assert said in told[0] and said in told[1]


def test_a_node_rank_given_twice(port, tmp_path):
    three = replace(HEAD, nodes=3)
    told = attend([three, replace(OTHER, nodes=3), replace(OTHER, nodes=3, host="n3")], port, tmp_path)
    assert all("node rank 1 connected twice" in text for text in told.values())


def test_missing_nodes_are_named_to_the_head_and_to_those_who_came(port, tmp_path):
    began = time.monotonic()
    told = attend([replace(HEAD, nodes=4), replace(OTHER, nodes=4, node_rank=2)], port, tmp_path, seconds=2)
    assert time.monotonic() - began < 60
    assert all("2 of 4 nodes connected within 2 s; missing node ranks: 1, 3." in text for text in told.values())


def test_no_head(port, tmp_path):
    with pytest.raises(UserError, match=f"head node did not answer at localhost:{port} within 1 s .*refused"):
        meet(OTHER, "localhost", port, tmp_path, 1)
    with pytest.raises(UserError, match=r"did not answer at no-such-host.invalid:\d+ within 1 s"):
        meet(OTHER, "no-such-host.invalid", port, tmp_path, 1)


def test_a_port_in_use(port, tmp_path):
    with (
        socket.create_server(("", port)),
        pytest.raises(UserError, match=f"Port {port} is in use on the head node .*--port"),
    ):
        meet(HEAD, "localhost", port, tmp_path, 1)


def test_a_stranger_on_the_port_is_ignored(port, tmp_path):
    def knock():
        while True:
            try:
                with socket.create_connection(("localhost", port), timeout=5) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\n\n")
                return
            except OSError:
                time.sleep(0.05)

    stranger = threading.Thread(target=knock)
    head = threading.Thread(target=meet, args=(HEAD, "localhost", port, tmp_path, 20))
    stranger.start()
    head.start()
    stranger.join(30)
    meet(OTHER, "localhost", port, tmp_path, 20)
    head.join(30)
    assert not head.is_alive()


def test_a_folder_that_is_not_shared(port, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "_appears", lambda path: False)  # as on a node with a disk of its own
    told = attend([HEAD, OTHER], port, tmp_path)
    assert all("is not shared: node ranks 1 do not see" in text for text in told.values())
    assert list(tmp_path.iterdir()) == []
