"""The launchers of several nodes end and start their processes together: real connections, processes that sleep."""

import socket
import subprocess
import sys
import threading
import time

import pytest

from orpo_dist.cluster import peers
from orpo_dist.cluster.line import Line
from orpo_dist.cluster.peers import Peers, Verdict
from orpo_dist.cluster.processes import GroupEnd

KILLED = GroupEnd(137, "rank 1 was killed by SIGKILL")
FAILED = GroupEnd(1, "rank 0 ended with exit code 1")
AGAIN = Verdict(137, "restart 1 of 3", 1, ("--resume_from_checkpoint", "auto"))


@pytest.fixture
def nodes():
    """The head's view of two nodes, and the view of one of them."""
    one, other = socket.socketpair()
    head, node = Peers({1: Line(one)}), Peers({0: Line(other)})
    yield head, node
    head.close()
    node.close()


def decided(head, end, verdict=AGAIN):
    seen = []

    def decide(ends, gone):
        seen.extend([list(ends), list(gone)])
        return verdict

    assert head.agree(end, decide) == verdict
    return seen


def on_the_other_node(node, end, told):
    """Its processes end like this; what follows is added to `told`."""

    def run():
        with node.watching(()):
            pass
        told.append(node.agree(end, lambda *_: pytest.fail("only the head decides")))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_the_head_decides_for_all_and_a_killed_rank_is_the_cause(nodes):
    head, node = nodes
    told = []
    thread = on_the_other_node(node, KILLED, told)
    with head.watching(()):
        pass
    ends, gone = decided(head, FAILED)
    thread.join(30)
    assert ends == [KILLED, FAILED] and gone == []
    assert told == [AGAIN]


def test_a_node_whose_launcher_is_gone(nodes):
    head, node = nodes
    node.close()
    ends, gone = decided(head, FAILED, Verdict(1, "not restarted"))
    assert ends == [FAILED] and gone == ["node rank 1"]


def test_the_head_is_gone(nodes):
    head, node = nodes
    head.close()
    verdict = node.agree(KILLED, lambda *_: pytest.fail("only the head decides"))
    assert verdict.code == 137 and not verdict.restart
    assert verdict.said.endswith("not restarted: the launcher of node rank 0 is gone")
    assert node.agree(GroupEnd(0), lambda *_: pytest.fail("only the head decides")) == Verdict(0)


@pytest.mark.parametrize("of", ["head", "node"])
def test_the_processes_of_other_nodes_are_ended(of, nodes, monkeypatch):
    """They wait in a collective for ranks that are not there any more."""
    monkeypatch.setattr(peers, "GRACE_SECONDS", 0.2)
    head, node = nodes
    waiting, failed = (head, node) if of == "head" else (node, head)
    told, began = [], time.monotonic()
    ends = []

    def fail():
        with failed.watching(()):
            pass
        told.append(failed.agree(KILLED, lambda all_ends, gone: ends.extend(all_ends) or AGAIN))

    thread = threading.Thread(target=fail)
    with waiting.watching(()):
        sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
        thread.start()
        assert sleeping.wait(30) == -9
    verdict = waiting.agree(
        GroupEnd(137, "rank 0 was killed by SIGKILL"), lambda all_ends, _: ends.extend(all_ends) or AGAIN
    )
    thread.join(30)
    assert [verdict, *told] == [AGAIN, AGAIN] and time.monotonic() - began < 30
    assert [end.cause for end in ends] == ["rank 1 was killed by SIGKILL", ""]


def test_a_node_that_has_finished_waits_for_the_others(nodes):
    head, node = nodes
    told = []
    thread = on_the_other_node(node, GroupEnd(75), told)
    with head.watching(()):
        time.sleep(0.5)
    ends, _ = decided(head, GroupEnd(0), Verdict(75))
    thread.join(30)
    assert [end.code for end in ends] == [0, 75] and told == [Verdict(75)]
