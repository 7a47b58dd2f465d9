"""What can be known to be wrong before anything is started, all of it at once."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from atelier_server.config import Settings
from atelier_server.data_directory import DataDirectory
from atelier_server.errors import StartError


def check(settings: Settings) -> None:
    """Raises StartError with every problem."""
    problems = [*_directory(settings), *_ports(settings)]
    if problems:
        raise StartError(*problems)


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
