"""The nodes of a run connect before its processes start, so that a misconfiguration ends with an error, not a hang.

Node rank 0 listens on the port that the process group will use later. Every other node connects and reports what it is
about to start. The listening socket is closed before any node gets an answer, so that a node that continues finds the
process group on that port or nothing, never a late rendezvous. Anyone may connect to a port: whoever does not report as
a node of this run is ignored, and never waited for.

    other node -> head   {"node_rank": 1, "nodes": 2, "processes": 8, "host": "n2", "versions": {...}, "recipe": "3f"}
    head -> other node   {"error": null, "token": "/shared/runs/a/.meeting-5c..."}     all connected, or an error
    other node -> head   {"sees_token": true}
    head -> other node   {"error": null}
"""

import errno
import selectors
import socket
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from orpo_dist.cluster.line import ANSWER_SECONDS, LONGEST_LINE, Line, parsed
from orpo_dist.errors import UserError

RETRY_SECONDS = 0.5
VISIBLE_SECONDS = 10  # time for a new file to appear on another node of a shared file system
MOST_STRANGERS = 256  # connections that have not reported yet; beyond, the oldest one is closed


@dataclass(frozen=True)
class NodeReport:
    """The report of a node. processes: per node. recipe: a digest of the file and the flags. restarts: at most.
    run: its folder."""

    node_rank: int
    nodes: int
    processes: int
    host: str
    versions: dict[str, str]
    recipe: str
    restarts: int = 0
    run: str = ""


def meet(
    report: NodeReport, head: str, port: int, run_folder: Path, seconds: float, *, keep: bool = False
) -> dict[int, Line]:
    """Returns when all nodes of the run are connected and agree; `run_folder` must exist on the head.

    Returns the open connections if `keep`, by node rank: the head's to all others, and each other one's to the head.

    Raises:
        UserError: the port is in use, the head does not answer, nodes are missing or connected twice within `seconds`,
            nodes disagree about the run or its versions, or do not share the run's folder.
    """
    with ExitStack() as stack:
        if report.node_rank == 0:
            lines = _host_rendezvous(report, port, run_folder, seconds, stack)
        else:
            lines = {0: _join_rendezvous(report, head, port, seconds, stack)}
        if keep:
            stack.pop_all()
            return lines
        for line in lines.values():
            if report.node_rank == 0:
                line.wait_for_end()
    return {}


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
    if other.restarts != head.restarts:
        return (
            f"{who} was started with --max-restarts {other.restarts}, the head ({head.host}) with {head.restarts}: use "
            "the same number on all nodes."
        )
    if other.recipe != head.recipe:
        return f"{who} was started with another recipe or other flags than the head ({head.host})."
    return None


def report_of(text: bytes) -> NodeReport | None:
    """The report in a line of bytes, or None: it is of another program."""
    message = parsed(text)
    if message is None:
        return None
    try:
        report = NodeReport(**message)
    except TypeError:
        return None
    numbers = (report.node_rank, report.nodes, report.processes, report.restarts)
    texts = (report.host, report.recipe, report.run)
    versions = report.versions if isinstance(report.versions, dict) else {"": None}
    whole = all(type(number) is int for number in numbers)
    return report if whole and all(isinstance(t, str) for t in (*texts, *versions, *versions.values())) else None


@dataclass
class _Arrivals:
    """Those who connect to the head, while it waits for the nodes of its run.

    Attributes:
        nodes, reports: of this run, by node rank. A node that disconnects may come again.
        again: connections of a node rank that is there already.
        error: why the run cannot start.
        strays: what was told to nodes of other runs.
    """

    head: NodeReport
    stack: ExitStack
    nodes: dict[int, Line] = field(default_factory=dict)
    reports: dict[int, NodeReport] = field(default_factory=dict)
    again: list[Line] = field(default_factory=list)
    error: str | None = None
    strays: list[str] = field(default_factory=list)
    _unknown: dict[socket.socket, bytes] = field(default_factory=dict)

    def wait(self, listening: socket.socket, deadline: float) -> None:
        """Until all nodes are there, one of them cannot join, or the time is over."""
        listening.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(listening, selectors.EVENT_READ)
            while len(self.nodes) < self.head.nodes - 1 and self.error is None and time.monotonic() < deadline:
                for key, _ in selector.select(min(max(deadline - time.monotonic(), 0.01), 1.0)):
                    if key.fileobj is listening:
                        self._accept(listening, selector)
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._read(key.fileobj, selector)
            for connection in self._unknown:
                connection.close()

    def _accept(self, listening: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = listening.accept()
        except OSError:  # it has gone again, or there are too many
            return
        connection.setblocking(False)
        if len(self._unknown) >= MOST_STRANGERS:
            self._drop(next(iter(self._unknown)), selector)
        self._unknown[connection] = b""
        selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            more = connection.recv(LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        if connection not in self._unknown:  # a node: it says nothing before it is answered
            if not more:
                self._forget(connection, selector)
            return
        self._unknown[connection] += more
        text, newline, _ = self._unknown[connection].partition(b"\n")
        if newline:
            report = report_of(text)
            if report is not None:
                del self._unknown[connection]
                self._report(Line(connection), connection, report, selector)
                return
        if newline or not more or len(text) > LONGEST_LINE:
            self._drop(connection, selector)

    def _report(
        self, line: Line, connection: socket.socket, other: NodeReport, selector: selectors.BaseSelector
    ) -> None:
        if other.run != self.head.run and other.recipe != self.head.recipe:
            said = f"{other.host} asked for the run {other.run}; this port is of {self.head.run} on {self.head.host}"
            self.strays.append(said)
            selector.unregister(connection)
            with line, suppress(OSError):
                line.send({"error": f"{said}: another run uses the port. Choose another one with --port."})
            return
        self.stack.enter_context(line)
        self.error = disagreement(self.head, other)
        if other.node_rank in self.nodes:
            first = self.reports[other.node_rank].host
            self.error = (
                f"node rank {other.node_rank} connected twice, from {first} and {other.host}: give each node its own "
                "rank."
            )
            self.again.append(line)
            return
        self.nodes[other.node_rank] = line
        self.reports[other.node_rank] = other

    def _forget(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        rank = next((rank for rank, line in self.nodes.items() if line.fileno() == connection.fileno()), None)
        if rank is not None:
            del self.nodes[rank], self.reports[rank]
        selector.unregister(connection)
        connection.close()

    def _drop(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        del self._unknown[connection]
        selector.unregister(connection)
        connection.close()


def _host_rendezvous(
    report: NodeReport, port: int, run_folder: Path, seconds: float, stack: ExitStack
) -> dict[int, Line]:
    arrivals = _Arrivals(report, stack)
    with _listen(port) as listening:
        arrivals.wait(listening, time.monotonic() + seconds)
    nodes, error = arrivals.nodes, arrivals.error
    if error is None and len(nodes) < report.nodes - 1:
        missing = sorted(set(range(1, report.nodes)) - nodes.keys())
        strays = f" ({'; '.join(arrivals.strays)})" if arrivals.strays else ""
        error = (
            f"{len(nodes) + 1} of {report.nodes} nodes connected within {seconds:.0f} s; missing node ranks: "
            f"{', '.join(map(str, missing))}{strays}. Start them with this head's address and port {port}, or correct "
            "the number of nodes."
        )
    token = run_folder / f".meeting-{uuid.uuid4().hex}"
    if error is None:
        token.touch()
    try:
        for line in (*nodes.values(), *arrivals.again):
            with suppress(OSError):  # that node has disconnected; the others still need the answer
                line.send({"error": error, "token": str(token)})
        if error is None:
            blind = [rank for rank, line in nodes.items() if not _answers_that_it_sees(line)]
            if blind:
                error = (
                    f"{run_folder} is not shared: node ranks {', '.join(map(str, sorted(blind)))} do not see files "
                    "that the head writes there. Set output_dir to a folder that all nodes share."
                )
            for line in nodes.values():
                with suppress(OSError):
                    line.send({"error": error})
    finally:
        token.unlink(missing_ok=True)
    if error is not None:
        raise UserError(error)
    return nodes


def _join_rendezvous(report: NodeReport, head: str, port: int, seconds: float, stack: ExitStack) -> Line:
    deadline = time.monotonic() + seconds
    while True:
        line = stack.enter_context(Line(_connect(head, port, max(deadline - time.monotonic(), RETRY_SECONDS))))
        try:
            line.send(asdict(report))
            answer = line.receive(max(deadline - time.monotonic(), 0) + ANSWER_SECONDS)
            break
        except (OSError, ValueError) as error:
            # What an earlier run has left on the port, or another program: the head may come yet.
            line.close()
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise UserError(
                    f"{head}:{port} does not answer as the head node of this run ({error}): see the head's own "
                    "message, or choose another port with --port, on all nodes."
                ) from error
            time.sleep(RETRY_SECONDS)
    try:
        if answer.get("error") is None:
            line.send({"sees_token": _appears(Path(str(answer["token"])))})
            answer = line.receive()
        error_there = answer["error"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The head node {head}:{port} closed the rendezvous ({error}): see its own message.") from error
    if error_there is not None:
        raise UserError(str(error_there))
    return line


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


def _answers_that_it_sees(line: Line) -> bool:
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
