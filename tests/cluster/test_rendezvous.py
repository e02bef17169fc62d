"""Nodes meet before a run: what cannot work ends in a sentence, in bounded time."""

import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace

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


def connected(port, seconds=30.0) -> socket.socket:
    """A connection to whoever listens on the port, as soon as someone does."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("localhost", port), timeout=5)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def of(report, **changes) -> bytes:
    return json.dumps(asdict(report) | changes).encode() + b"\n"


STRANGERS = {
    "a web browser": b"GET / HTTP/1.1\n\n",
    "one that goes again": b"",
    "deep JSON": b"[" * 60000 + b"\n",
    "no object": b"[1, 2]\n",
    "no text": b"\xff\xfe\x00\n",
    "a line without end": b"x" * 200000,
    "a number as text": of(OTHER, node_rank="1"),
    "a number as a truth value": of(OTHER, node_rank=True),
    "versions as a list": of(OTHER, versions=["torch"]),
    "a version that is a number": of(OTHER, versions={"torch": 2}),
    "an unknown field": of(OTHER, colour="red"),
    "a missing field": b'{"node_rank": 1}\n',
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_on_the_port_is_ignored(stranger, port, tmp_path):
    head = threading.Thread(target=meet, args=(HEAD, "localhost", port, tmp_path, 20))
    head.start()
    with connected(port) as connection:
        with suppress(OSError):  # the head may have closed it by now
            connection.sendall(STRANGERS[stranger])
            if not STRANGERS[stranger]:
                connection.shutdown(socket.SHUT_RDWR)
        began = time.monotonic()
        meet(OTHER, "localhost", port, tmp_path, 20)
        head.join(30)
        assert not head.is_alive() and time.monotonic() - began < 10


def test_strangers_who_say_nothing_do_not_hold_the_meeting_up(port, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "MOST_STRANGERS", 4)
    head = threading.Thread(target=meet, args=(HEAD, "localhost", port, tmp_path, 20))
    head.start()
    silent = [connected(port) for _ in range(8)]
    silent[-1].sendall(b'{"node_rank": ')  # and one that says a part
    began = time.monotonic()
    meet(OTHER, "localhost", port, tmp_path, 20)
    head.join(30)
    assert not head.is_alive() and time.monotonic() - began < 10
    for connection in silent:
        connection.close()


def test_a_node_of_another_run_is_told_so_and_breaks_nothing(port, tmp_path):
    ours = [replace(report, run="/runs/ours") for report in (HEAD, OTHER)]
    told = attend([*ours, replace(OTHER, run="/runs/theirs", recipe="theirs", host="n9")], port, tmp_path, seconds=3)
    assert told[0] is None and told[1] is None
    # Whoever came first: it is told at once, or finds the head gone.
    assert "n9 asked for the run /runs/theirs; this port is of /runs/ours" in told[2] or "did not answer" in told[2]


def test_a_node_of_another_run_is_named_when_one_is_missing(port, tmp_path):
    strange = replace(OTHER, run="/runs/theirs", recipe="theirs", host="n9")
    told = attend([replace(HEAD, run="/runs/ours"), strange], port, tmp_path, seconds=2)
    assert "missing node ranks: 1 (n9 asked for the run /runs/theirs; this port is of /runs/ours on n1)." in told[0]


def test_a_node_that_has_gone_may_come_again(port, tmp_path):
    """A pod that is started anew while the others wait."""
    head = threading.Thread(target=meet, args=(replace(HEAD, nodes=3), "localhost", port, tmp_path, 30))
    head.start()
    with connected(port) as first:
        first.sendall(of(OTHER, nodes=3))
        time.sleep(0.3)
    time.sleep(0.3)
    nodes = [replace(OTHER, nodes=3, node_rank=rank) for rank in (1, 2)]
    assert attend(nodes, port, tmp_path, seconds=20) == {0: None, 1: None}
    head.join(30)
    assert not head.is_alive()


def test_another_program_where_the_head_will_be(port, tmp_path):
    """What an earlier run has left there closes each connection; then the head comes."""

    def leftover():
        with socket.create_server(("", port)) as server:
            for _ in range(2):
                server.accept()[0].close()

    earlier = threading.Thread(target=leftover)
    earlier.start()
    node = threading.Thread(target=meet, args=(OTHER, "localhost", port, tmp_path, 30))
    node.start()
    earlier.join(30)
    meet(HEAD, "localhost", port, tmp_path, 30)
    node.join(30)
    assert not node.is_alive()


def test_another_program_that_stays(port, tmp_path):
    with socket.create_server(("", port)) as server:
        threading.Thread(target=lambda: [server.accept()[0].close() for _ in range(2)], daemon=True).start()
        with pytest.raises(UserError, match=f"localhost:{port} does not answer as the head node of this run"):
            meet(OTHER, "localhost", port, tmp_path, 0.6)


def test_restarts_must_be_the_same_on_all_nodes(port, tmp_path):
    told = attend([replace(HEAD, restarts=3), OTHER], port, tmp_path)
    assert all("--max-restarts 0, the head (n1) with 3" in text for text in told.values())


def test_lines_are_kept_while_the_processes_use_the_port(port, tmp_path):
    kept = {}
    node = threading.Thread(target=lambda: kept.update(meet(OTHER, "localhost", port, tmp_path, 20, keep=True)))
    node.start()
    lines = meet(HEAD, "localhost", port, tmp_path, 20, keep=True)
    node.join(30)
    with socket.create_server(("", port)):
        lines[1].send({"end": True})
        assert kept[0].receive(5) == {"end": True}
    kept[0].close()
    lines[1].close()


def test_a_folder_that_is_not_shared(port, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "_appears", lambda path: False)  # as on a node with a disk of its own
    told = attend([HEAD, OTHER], port, tmp_path)
    assert all("is not shared: node ranks 1 do not see" in text for text in told.values())
    assert list(tmp_path.iterdir()) == []
