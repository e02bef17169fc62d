"""JSON objects over a connection between two nodes, one per line."""

import json
import select
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

ANSWER_SECONDS = 30  # time for a connected node to send its next line
LONGEST_LINE = 65536


class Line:
    """A connection that has said who it is."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a firewall forgets silent connections
        self._connection = connection
        self._received = b""

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        self._connection.settimeout(ANSWER_SECONDS)
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = ANSWER_SECONDS) -> dict[str, Any]:
        """The next object; `seconds` None waits for as long as the other side is there. Raises OSError (also on a
        timeout) or ValueError if there is none."""
        self._connection.settimeout(seconds)
        while b"\n" not in self._received:
            more = self._connection.recv(LONGEST_LINE)
            if not more or len(self._received) > LONGEST_LINE:
                raise ValueError("the connection was closed")
            self._received += more
        text, self._received = self._received.split(b"\n", 1)
        message = parsed(text)
        if message is None:
            raise ValueError("the answer is not a JSON object")
        return message

    def has_more(self, seconds: float) -> bool:
        """Whether `receive` would find something within this time, the end of the connection included."""
        return b"\n" in self._received or bool(select.select([self._connection], [], [], seconds)[0])

    def wait_for_end(self) -> None:
        """Let the other side close first, so that the head's port is not left in TIME_WAIT."""
        with suppress(OSError, ValueError):
            self.receive()


def parsed(text: bytes) -> dict[str, Any] | None:
    """The JSON object in a line of bytes, or None: anyone may connect to a port, and send anything."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
