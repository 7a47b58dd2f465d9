"""How commands reach a server: the flags that every command with `--server` has, and the client they make."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

from atelier.channel import DEFAULT_ADDRESS
from atelier.client import Client

_PANEL = "Connection"
_given: ContextVar[dict[str, Any]] = ContextVar("connection")


def _option(name: str, kind: Any, text: str, **more: Any) -> inspect.Parameter:
    shown = f"{text} (ATELIER_{name.upper()})"
    option = typer.Option(
        f"--{name.replace('_', '-')}", help=shown, rich_help_panel=_PANEL, show_default=False, **more
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


# The variables are read by the SDK.
_OPTIONS = (
    _option("token", str, "says who you are; other users of this machine can see flags: prefer the file"),
    _option("token_file", Path, "a file with the token"),
    _option("tls", bool, "encrypt, with the authorities that this machine trusts"),
    _option("tls_ca", Path, "encrypt, with the authorities in this PEM file"),
    _option("tls_cert", Path, "your own certificate, PEM"),
    _option("tls_key", Path, "its key, PEM"),
)


def with_connection(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags to a command that has `--server`; `connect` within it uses them."""
    signature = inspect.signature(command, eval_str=True)
    if "server" not in signature.parameters:
        return command

    def run(**values: Any) -> Any:
        token = _given.set({option.name: values.pop(option.name) for option in _OPTIONS})
        try:
            return command(**values)
        finally:
            _given.reset(token)

    parameters = [*signature.parameters.values(), *_OPTIONS]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def again(server: str) -> str:
    """The flags by which the same server is reached again, a token left out: other users could read it."""
    given = {"server": server if server != DEFAULT_ADDRESS else None, **_given.get({})}
    words = []
    for name, value in given.items():
        if value is not None and name != "token":
            flag = f"--{name.replace('_', '-')}"
            words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return "".join(f" {word}" for word in words)


def connect(server: str) -> Client:
    """A client of that server, as the flags say."""
    return Client(server, **_given.get({}))
