"""`atelier serve`: becomes the server."""

from __future__ import annotations

import os
import sys

import typer

from atelier.cli.local_server import need_server


def serve(context: typer.Context) -> None:
    """Run a server; every flag is the server's: see `atelier serve --help`."""
    need_server()
    os.execv(sys.executable, [sys.executable, "-m", "atelier_server", *context.args])
