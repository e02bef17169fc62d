"""The nodes of a run connect before its processes start, so that a misconfiguration ends with an error, not a hang.

Node rank 0 listens on the port that the process group will use later. Every other node connects and reports what it is
about to start. The listening socket is closed before any node gets an answer, so that a node that continues finds the
process group on that port or nothing, never a late rendezvous.

    other node -> head   {"node_rank": 1, "nodes": 2, "processes": 8, "host": "n2", "versions": {...}, "recipe": "3f"}
    head -> other node   {"error": null, "token": "/shared/runs/a/.meeting-5c..."}     all connected, or an error
    other node -> head   {"sees_token": true}
    head -> other node   {"error": null}
"""

import errno
import json
import socket
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orpo_dist.errors import UserError

RETRY_SECONDS = 0.5
ANSWER_SECONDS = 30  # time for a connected node to send its next line
VISIBLE_SECONDS = 10  # time for a new file to appear on another node of a shared file system
_LONGEST_LINE = 65536


@dataclass(frozen=True)
class NodeReport:
    """The report of a node. processes: per node. recipe: a digest of the file and the flags."""

    node_rank: int
    nodes: int
    processes: int
    host: str
    versions: dict[str, str]
    recipe: str


def meet(report: NodeReport, head: str, port: int, run_folder: Path, seconds: float) -> None:
    """Returns when all nodes of the run are connected and agree; `run_folder` must exist on the head.

    Raises:
        UserError: the port is in use, the head does not answer, nodes are missing or connected twice within `seconds`,
            nodes disagree about the run or its versions, or do not share the run's folder.
    """
    if report.node_rank == 0:
        _host_rendezvous(report, port, run_folder, seconds)
    else:
        _join_rendezvous(report, head, port, seconds)


def disagreement(head: NodeReport, other: NodeReport) -> str | None:
    """Why `other` cannot join the head's run, in one sentence, or None."""
    who = f"node rank {other.node_rank} ({other.host})"
    if other.nodes != head.nodes:
        return (
            f"{who} was started for {other.nodes} nodes, the head ({head.host}) for {head.nodes}: use the same "
            "number on all nodes."
        )
    if not 0 < other.node_rank < head.nodes:
        return f"{who}: with {head.nodes} nodes the node ranks are 0 to {head.nodes - 1}."
    if other.processes != head.processes:
        return (
            f"{who} starts {other.processes} processes, the head ({head.host}) {head.processes}: use the same "
            "number on all nodes."
        )
    differing = [
        f"{name} {other.versions.get(name, 'missing')} against {version}"
        for name, version in head.versions.items()
        if other.versions.get(name) != version
    ]
    if differing:
        return (
            f"{who} has other versions than the head ({head.host}): {', '.join(differing)}. Install the same versions."
        )
    if other.recipe != head.recipe:
        return f"{who} was started with another recipe or other flags than the head ({head.host})."
    return None


def _host_rendezvous(report: NodeReport, port: int, run_folder: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        nodes: dict[int, _Line] = {}
        reports: dict[int, NodeReport] = {}
        duplicates: list[_Line] = []
        error: str | None = None
        with _listen(port) as listening:
            while len(nodes) < report.nodes - 1 and error is None:
                try:
                    listening.settimeout(max(deadline - time.monotonic(), 0.01))
                    connection, _ = listening.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, report.nodes)) - nodes.keys())
                    error = (
                        f"{len(nodes) + 1} of {report.nodes} nodes connected within {seconds:.0f} s; missing node "
                        f"ranks: {', '.join(map(str, missing))}. Start them with this head's address and port {port}, "
                        "or correct the number of nodes."
                    )
                    break
                line = stack.enter_context(_Line(connection))
                try:
                    other = NodeReport(**line.receive())
                except (OSError, ValueError, TypeError):  # another program connected to the port
                    continue
                error = disagreement(report, other)
                if other.node_rank in nodes:
                    first = reports[other.node_rank].host
                    error = (
                        f"node rank {other.node_rank} connected twice, from {first} and {other.host}: give each node "
                        "its own rank."
                    )
                    duplicates.append(line)
                    continue
                nodes[other.node_rank] = line
                reports[other.node_rank] = other
        token = run_folder / f".meeting-{uuid.uuid4().hex}"
        if error is None:
            token.touch()
        try:
            for line in (*nodes.values(), *duplicates):
                with suppress(OSError):  # that node has disconnected; the others still need the answer
                    line.send({"error": error, "token": str(token)})
            if error is None:
                blind = [rank for rank, line in nodes.items() if not _answers_that_it_sees(line)]
                if blind:
                    error = (
                        f"{run_folder} is not shared: node ranks {', '.join(map(str, sorted(blind)))} do not see "
                        "files that the head writes there. Set output_dir to a folder that all nodes share."
                    )
                for line in nodes.values():
                    with suppress(OSError):
                        line.send({"error": error})
        finally:
            token.unlink(missing_ok=True)
        if error is not None:
            raise UserError(error)
        for line in nodes.values():
            line.wait_for_end()


def _join_rendezvous(report: NodeReport, head: str, port: int, seconds: float) -> None:
    with _Line(_connect(head, port, seconds)) as line:
        try:
            line.send(asdict(report))
            answer = line.receive(seconds + ANSWER_SECONDS)
            if answer["error"] is None:
                line.send({"sees_token": _appears(Path(answer["token"]))})
                answer = line.receive()
        except (OSError, ValueError) as error:
            raise UserError(
                f"The head node {head}:{port} closed the rendezvous ({error}): see its own message."
            ) from error
    if answer["error"] is not None:
        raise UserError(answer["error"])


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"Port {port} is in use on the head node ({socket.gethostname()}): another run may use it, or an "
                "earlier one has not ended. Choose another port with --port, on all nodes."
            ) from error
        raise UserError(
            f"Port {port} cannot be used on the head node: {error}. Choose another port with --port."
        ) from error


def _connect(head: str, port: int, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((head, port), timeout=max(min(5.0, deadline - time.monotonic()), 0.1))
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise UserError(
                    f"The head node did not answer at {head}:{port} within {seconds:.0f} s ({error}). Was node rank 0 "
                    "started there, with the same port? Can this node reach that address (name, network, firewall)?"
                ) from error
            time.sleep(RETRY_SECONDS)


def _answers_that_it_sees(line: "_Line") -> bool:
    try:
        return bool(line.receive(VISIBLE_SECONDS + ANSWER_SECONDS)["sees_token"])
    except (OSError, ValueError, KeyError):
        return False


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(RETRY_SECONDS)
    return True


class _Line:
    """JSON objects over a connection, one per line."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._file = connection.makefile("rb")

    def __enter__(self) -> "_Line":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._connection.close()

    def send(self, message: dict[str, Any]) -> None:
        self._connection.settimeout(ANSWER_SECONDS)
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """The next object. Raises OSError (also on a timeout) or ValueError if there is none."""
        self._connection.settimeout(seconds)
        message = json.loads(self._file.readline(_LONGEST_LINE) or b"null")
        if not isinstance(message, dict):
            raise ValueError("the connection was closed")
        return message

    def wait_for_end(self) -> None:
        """Let the other side close first, so that the head's port is not left in TIME_WAIT."""
        with suppress(OSError, ValueError):
            self.receive()
