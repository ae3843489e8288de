# SPDX-License-Identifier: Apache-2.0
"""How a model on a server and GPUs are named. Standard library only: the command lines read it."""

import socket
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit


def parse_devices(text: str) -> tuple[int, ...] | Literal["all"]:
    """ "all", or GPU numbers separated by commas, each once.

    Raises:
        ValueError: it is neither.
    """
    if text == "all":
        return "all"
    try:
        devices = tuple(int(part) for part in text.split(","))
    except ValueError:
        devices = ()
    if not devices or min(devices) < 0 or len(set(devices)) < len(devices):
        raise ValueError(f"expected 'all' or different GPU numbers as in 0,1, got {text!r}")
    return devices


#: Scheme -> port where the URL names none. Triton itself speaks no TLS over HTTP: that is a
#: proxy's.
PORTS = {"grpc": 8001, "grpcs": 8001, "http": 8000, "https": 443}
URL_FORM = (
    "grpc://HOST:8001/MODEL or http://HOST:8000/MODEL, with /VERSION behind it where one is meant"
)


@dataclass(frozen=True)
class TritonUrl:
    """Where a model is served. `version` "": the one that the server chooses."""

    scheme: str
    address: str  # host:port
    model: str
    version: str = ""

    @property
    def name(self) -> str:
        """What reports call the model."""
        return self.model

    @property
    def is_http(self) -> bool:
        return self.scheme in ("http", "https")

    @property
    def is_local(self) -> bool:
        """Whether the server seems to be on this machine."""
        host = self.address.rpartition(":")[0].strip("[]")
        return host in ("localhost", "127.0.0.1", "::1", socket.gethostname())

    def __str__(self) -> str:
        parts = [self.address, self.model, self.version]
        return f"{self.scheme}://{'/'.join(filter(None, parts))}"


def is_url(text: object) -> bool:
    """Whether this names a model on a server, not a file."""
    return isinstance(text, str) and text.partition("://")[0] in PORTS


def parse_url(text: str) -> TritonUrl:
    """grpc://HOST:PORT/MODEL, http://HOST:PORT/MODEL, and either with /VERSION behind it.

    Raises:
        ValueError: another form.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port or PORTS[parts.scheme]
    except (ValueError, KeyError):  # no number, or another scheme
        host, port = None, 0
    names = parts.path.strip("/").split("/") if host else []
    plain = host and not (parts.username or parts.query or parts.fragment)
    if not plain or not 1 <= len(names) <= 2 or not all(names):
        raise ValueError(f"expected {URL_FORM}, got {text!r}")
    if len(names) == 2 and not names[1].isdecimal():
        raise ValueError(f"expected a number as the version, got {text!r}")
    address = f"[{host}]:{port}" if host and ":" in host else f"{host}:{port}"
    return TritonUrl(parts.scheme, address, *names)
