"""What can be known to be wrong before anything is started, all of it at once."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

from atelier_server.access.identity import Identity, identity_of
from atelier_server.access.tokens import Tokens
from atelier_server.config import Settings
from atelier_server.data_directory import DataDirectory
from atelier_server.errors import StartError
from atelier_server.rpc.tls import Certificates


def check(settings: Settings) -> None:
    """Raises StartError with every problem."""
    problems = [*_directory(settings), *_access(settings), *_ports(settings)]
    if problems:
        raise StartError(*problems)


@dataclass(frozen=True, slots=True)
class Access:
    """Whom the server lets in, and how it proves to be itself."""

    identity: Identity
    certificates: Certificates | None


def open_access(settings: Settings) -> Access:
    """Reads the files of tokens and certificates. Raises StartError with every problem in them."""
    problems: list[str] = []
    certificates = tokens = None
    if settings.cert_file and settings.key_file:
        try:
            certificates = Certificates(settings.cert_file, settings.key_file, settings.client_ca_file)
        except StartError as error:
            problems += error.problems
    if settings.tokens_file:
        try:
            tokens = Tokens(settings.tokens_file, settings.quotas)
        except StartError as error:
            problems += error.problems
    if problems:
        raise StartError(*problems)
    identity = identity_of(tokens, settings.quotas, certificates=settings.client_ca_file is not None)
    return Access(identity, certificates)


def _access(settings: Settings) -> Iterator[str]:
    try:
        open_access(settings)
    except StartError as error:
        yield from error.problems


def _directory(settings: Settings) -> Iterator[str]:
    try:
        DataDirectory(settings.data_dir.absolute()).close()
    except StartError as error:
        yield from error.problems


def _ports(settings: Settings) -> Iterator[str]:
    """Listening will find a port taken as well, but only the first, and after the model was loaded."""
    ports = {
        "port": settings.port,
        "metrics-port": settings.metrics_port,
        "health-port": settings.health_port,
    }
    for name, port in ports.items():
        if port > 0 and (problem := _taken(settings.host, port)):
            yield f"--{name}: cannot listen on {settings.host}:{port}: {problem}"


def _taken(host: str, port: int) -> str:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""
