"""Where a server listens, and which host names are this machine's own.

A browser sends the name that its page asked for in the Host header. A page of the web can point a name of its own at
127.0.0.1 (DNS rebinding) and then read what a server without a key says there; it cannot change the Host header. So
such a server answers only to names that nobody else can point anywhere.
"""

from __future__ import annotations

import re
import resource
import socket
from ipaddress import ip_address

from finetune.errors import FinetuneError

BACKLOG = 2048
_OTHER_FILES = 200  # that a process with a model has open: libraries, devices, pipes
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:\[\]/@]+)(?::\d{1,5})?", re.IGNORECASE)


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address that does not listen yet; port 0 takes a free one.

    Raises:
        FinetuneError: no such address on this machine, or a port that is in use or not allowed.
    """
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from None
    return bound


def listen(bound: socket.socket) -> None:
    """Lets clients connect.

    Raises:
        FinetuneError: another server took the port since it was bound.
    """
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _cannot_listen(host, port, error) from None


def allow_connections(count: int) -> int:
    """How many clients may be connected: `count`, or fewer where the system lets a process open fewer files."""
    wanted = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(soft - _OTHER_FILES, 1)
    return count


def url_of(bound: socket.socket) -> str:
    """Where clients find the server, without a path."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(bound: socket.socket) -> bool:
    """Whether only programs on this machine reach it."""
    return _is_loopback(bound.getsockname()[0])


def host_name(header: str) -> str | None:
    """The name in a Host header, in lower case and without its port; None for what is no such header."""
    found = _HOST.fullmatch(header)
    return None if found is None else found[1].lower().removesuffix(".")


def is_local_name(name: str) -> bool:
    """Whether a name always means this machine: localhost, 127.0.0.1 and its like, [::1]."""
    return name == "localhost" or _is_loopback(name.strip("[]"))


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> FinetuneError:
    return FinetuneError(
        f"cannot listen on {host} port {port}: {error.strerror if isinstance(error, OSError) else 'not a host name'}",
        where="--host, --port",
        allowed="an address of this machine and a port that nothing listens on; --port 0 takes a free one",
        fix="choose another port, or stop what uses it",
    )
