"""Fetches what lies at an address of the public web, within a deadline for all of it.

An address in a data set is somebody else's text: it must not reach the machines of the reader's own network, such as a
cloud's metadata service. A host's addresses are checked after they are resolved, at each redirection, and the checked
address is the one that is connected to, so that a name server cannot answer differently the second time.
"""

import http.client
import ipaddress
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

SCHEMES = ("http", "https")
# Prefixes of IPv6 whose last 32 bits are an address of IPv4: NAT64, and IPv4-compatible. RFC 6052, RFC 4291.
_HOLD_IPV4 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")))


class Refused(ValueError):
    """The address leads into a network that is not public."""


class TooLarge(ValueError):
    """More bytes than allowed."""


def get(address: str, deadline: float, most_bytes: int) -> bytes:
    """What lies at an address.

    Args:
        deadline: of `time.monotonic()`, for resolving, connecting, redirections and content together.

    Raises:
        Refused: a host without public address, here or after a redirection.
        TooLarge: more than `most_bytes`.
        OSError, ValueError, http.client.HTTPException: it cannot be had; TimeoutError: not in time.
    """
    request = urllib.request.Request(address, headers={"User-Agent": "orpo-dist", "Accept": "image/*"})
    fetch = _Fetch(deadline)
    opener = urllib.request.build_opener(_WebOnly, _Http(fetch), _Https(fetch))
    content = bytearray()
    try:
        with opener.open(request, timeout=_left(deadline)) as answer:
            while part := answer.read1(1 << 16):
                content += part
                if len(content) > most_bytes:
                    raise TooLarge(f"more than {most_bytes} bytes")
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= deadline and not isinstance(error, urllib.error.HTTPError):
            raise TimeoutError("not complete in time") from error
        raise
    finally:
        fetch.close()
    if time.monotonic() >= deadline:  # the watch has closed the connection, which looks like the end
        raise TimeoutError("not complete in time")
    return bytes(content)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also where it stands inside one of IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(ip in network for network in _HOLD_IPV4):
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(v4 is not None and not is_public(str(v4)) for v4 in inner):
            return False
        if ip.ipv4_mapped is not None:
            return True
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("not complete in time")
    return left


def _resolved(host: str, port: int, deadline: float) -> list[tuple[int, Any]]:
    """Families and socket addresses of a host. In a thread: resolving knows no timeout.

    Raises:
        Refused: none of them is public.
    """
    found: list[Any] = []

    def resolve() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.append(error)

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_left(deadline))
    if not found:
        raise TimeoutError(f"{host} was not resolved in time")
    if isinstance(found[0], BaseException):
        raise OSError(f"{host} cannot be resolved: {found[0]}")
    public = [(family, place) for family, _, _, _, place in found[0] if is_public(str(place[0]))]
    if not public:
        places = ", ".join(sorted({str(entry[4][0]) for entry in found[0]}))
        raise Refused(f"{host} is {places}, which is no address of the public internet")
    return public


class _Fetch:
    """The connections of one fetch: each to a checked address, and all ended at the deadline, since a timeout of a
    socket begins again with each byte."""

    def __init__(self, deadline: float):
        self._deadline, self._watches = deadline, list[tuple[threading.Timer, socket.socket]]()

    def connect(self, place: tuple[str, int], *_: Any) -> socket.socket:
        """In the place of socket.create_connection."""
        problem: OSError = TimeoutError("not complete in time")
        for family, address in _resolved(*place, self._deadline):
            connection = socket.socket(family, socket.SOCK_STREAM)
            try:
                connection.settimeout(_left(self._deadline))
                connection.connect(address)
                return self._watched(connection)
            except OSError as error:
                connection.close()
                problem = error
        raise problem

    def connect_to_proxy(self, place: tuple[str, int], *_: Any) -> socket.socket:
        return self._watched(socket.create_connection(place, _left(self._deadline)))

    def refuse(self, host: str) -> None:
        """Raises Refused for the target of a proxy, which this machine may not be able to resolve."""
        with suppress(OSError):
            _resolved(host, 443, self._deadline)

    def close(self) -> None:
        for watch, connection in self._watches:
            watch.cancel()
            connection.close()

    def _watched(self, connection: socket.socket) -> socket.socket:
        same = connection.dup()  # TLS takes the original over

        def end() -> None:
            with suppress(OSError):
                same.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(_left(self._deadline), end)
        watch.daemon = True
        watch.start()
        self._watches.append((watch, same))
        return connection


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Python's own would follow a redirection to ftp."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> Any:
        if urlsplit(newurl).scheme not in SCHEMES:
            raise urllib.error.HTTPError(newurl, code, "redirected to another protocol", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, fetch: _Fetch):
        super().__init__()
        self._fetch = fetch

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(_made, http.client.HTTPConnection, _connect_for(self._fetch, req)), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, fetch: _Fetch):
        super().__init__()
        self._fetch = fetch

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(_made, http.client.HTTPSConnection, _connect_for(self._fetch, req)), req)


def _made(kind: Any, connect: Any, *args: Any, **kwargs: Any) -> Any:
    """A connection that opens its socket with `connect`. http.client has no public way; the name is that of its own
    attribute since Python 3.5, https://github.com/python/cpython/blob/3.11/Lib/http/client.py"""
    connection = kind(*args, **kwargs)
    connection._create_connection = connect
    return connection


def _connect_for(fetch: _Fetch, request: urllib.request.Request) -> Any:
    target = urlsplit(request.full_url).hostname or ""
    if request.host == urlsplit(request.full_url).netloc:
        return fetch.connect
    fetch.refuse(target)  # by way of a proxy, which connects
    return fetch.connect_to_proxy
