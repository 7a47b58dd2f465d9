"""`atelier serve`: becomes the server."""

from __future__ import annotations

import importlib.util
import os
import sys

import typer

from atelier.cli import output

NEEDED = ("torch", "diffusers", "pydantic", "sqlalchemy", "grpc_health", "atelier_server")


def serve(context: typer.Context) -> None:
    """Run a server; every flag is the server's: see `atelier serve --help`."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        output.say(f"error: the server needs {', '.join(missing)}")
        output.say("install it with: pip install 'atelier[server]'")
        raise typer.Exit(1)
    os.execv(sys.executable, [sys.executable, "-m", "atelier_server", *context.args])
