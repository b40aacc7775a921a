"""What all tests share: no network, the tiny checkpoint, the folder of evaluation data."""

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Worker processes and subprocesses inherit these two; the blocked sockets below they do not.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")  # plots need no screen


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


@pytest.fixture(scope="session", autouse=True)
def blocked_network() -> Iterator[None]:
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


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of a tiny NV-Embed checkpoint, its tokenizer and its golden vectors."""
    return ROOT / "tests" / "golden" / "nvembed-tiny"


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """Folder of the public evaluation sets, which are not part of the repository."""
    folder = Path(os.environ.get("SKEMBED_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "eval").is_dir():
        pytest.skip("needs the evaluation data: set SKEMBED_DATA to the folder that holds eval/")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a fresh generator, seeded the same for each test."""
    return np.random.default_rng(0)
