"""A block on every connection that leaves this machine."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class NetworkBlockedError(RuntimeError):
    """A test reached for the network.

    Not an OSError on purpose: code that forgives a missing network must not hide the attempt.
    """


def is_local(host: object) -> bool:
    """Tell whether a host is this machine (None and "" mean the wildcard address)."""
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(text.partition("%")[0]).is_loopback
    except ValueError:
        return False


@contextmanager
def block_network() -> Iterator[None]:
    """Refuse every connection that leaves this machine (loopback stays: loky uses it)."""

    def guard(method: str) -> Any:
        original = getattr(socket.socket, method)

        def guarded(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
                raise NetworkBlockedError(f"tests run offline; got a connection to {address!r}")
            return original(self, address)

        return guarded

    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_local(host):
            raise NetworkBlockedError(f"tests run offline; got a look-up of {host!r}")
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for method in ("connect", "connect_ex"):
            patch.setattr(socket.socket, method, guard(method))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield
