"""Where an address may lead, and for how long: a server on this machine, and Python's own resolver."""

import http.server
import socket
import threading
import time
from contextlib import suppress

import pytest

from orpo_dist.images import web
from orpo_dist.images.source import fetch

MOST = 1 << 20
SECONDS = 2.0


class Server(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        Server.asked.append(self.path)
        where = self.path.partition("?to=")[2]
        if where:
            self.send_response(302)
            self.send_header("Location", where)
            self.end_headers()
            return
        if self.path == "/slow-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for number in range(200):
                self.wfile.write(f"X-{number}: a\r\n".encode())
                time.sleep(0.1)
        elif self.path == "/silent":
            time.sleep(20)
        elif self.path == "/nonsense":
            self.wfile.write(b"nonsense\r\n\r\n")
        elif self.path.startswith("/loop"):
            time.sleep(0.4)
            self.send_response(302)
            self.send_header("Location", f"{self.path}o")
            self.end_headers()
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"content")
            if self.path == "/drip":
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.1)

    def handle(self):
        with suppress(OSError):
            super().handle()

    def log_message(self, *_):
        pass


@pytest.fixture
def port(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Server.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def reachable(port, monkeypatch):
    """The port of the server, which counts as public; 127.0.0.2 and all others stay private."""
    monkeypatch.setattr(web, "is_public", lambda address: address == "127.0.0.1")
    return port


def get(address: str) -> bytes:
    return web.get(address, time.monotonic() + SECONDS, MOST)


PRIVATE = [
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
    "fd12::3", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::", "2002:a00:1::1", "::127.0.0.1", "2001:db8::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private(address):
    assert not web.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public(address):
    assert web.is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_an_address_of_this_machine_is_refused_however_it_is_written(port, host):
    with pytest.raises((web.Refused, OSError)):
        get(f"http://{host}:{port}/a")
    assert Server.asked == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_metadata_service_is_refused_before_anything_is_sent(scheme):
    began = time.monotonic()
    with pytest.raises(web.Refused, match=r"169\.254\.169\.254, which is no address of the public internet"):
        get(f"{scheme}://169.254.169.254/latest/meta-data/")
    assert time.monotonic() < began + 1


def test_each_redirection_is_checked(reachable):
    there = f"http://127.0.0.2:{reachable}/secret"
    assert get(f"http://127.0.0.1:{reachable}/b?to=/a") == b"content"
    with pytest.raises(web.Refused, match=r"127\.0\.0\.2"):
        get(f"http://127.0.0.1:{reachable}/b?to={there}")
    with pytest.raises(web.Refused, match=r"127\.0\.0\.2"):
        get(f"http://127.0.0.1:{reachable}/b?to=http://127.0.0.1:{reachable}/c?to={there}")
    assert "/secret" not in Server.asked


def test_the_checked_address_is_the_one_that_is_connected_to(reachable, monkeypatch):
    """A name server that answers with another address each time."""
    answers, real = ["127.0.0.1", "127.0.0.2"], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **kwargs: real(answers.pop(0), *args, **kwargs))
    assert get(f"http://rebinding.example:{reachable}/a") == b"content"
    assert answers == ["127.0.0.2"]


@pytest.mark.parametrize("path", ["slow-headers", "silent", "drip", "loop"])
def test_one_deadline_for_all_of_it(reachable, path):
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        get(f"http://127.0.0.1:{reachable}/{path}")
    assert time.monotonic() < began + SECONDS + 1.5


def test_resolving_counts(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(30))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="in time"):
        get("http://slow.example/a")
    assert time.monotonic() < began + SECONDS + 1.5


def test_no_thread_and_no_connection_is_left(reachable):
    before = threading.active_count()
    for _ in range(20):
        get(f"http://127.0.0.1:{reachable}/a")
    time.sleep(0.5)
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize("path", ["nonsense", "silent"])
def test_a_row_with_such_an_address_is_a_bad_row(reachable, monkeypatch, path):
    from orpo_dist.errors import BadRow

    monkeypatch.setattr("orpo_dist.images.source.URL_TIMEOUT", 0.5)
    began = time.monotonic()
    with pytest.raises(BadRow, match="cannot be fetched"):
        fetch(f"http://127.0.0.1:{reachable}/{path}", "images")
    assert time.monotonic() < began + 3


def test_a_proxy_is_used_and_its_targets_are_checked(port, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert get("http://8.8.8.8/a") == b"content"
    assert Server.asked == ["http://8.8.8.8/a"]
    with pytest.raises(web.Refused):
        get("http://10.0.0.1/a")
    assert len(Server.asked) == 1
