"""Flags of the command line from the tables of `fields.py`, and those that every command has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from atelier import channel
from atelier.fields import Controls, PictureFile

Command = TypeVar("Command", bound=Callable[..., Any])

Server = Annotated[
    str,
    typer.Option("--server", envvar="ATELIER_SERVER", metavar="HOST:PORT", help="the server to talk to"),
]
Json = Annotated[bool, typer.Option("--json", help="machine-readable: one object, or one a line for streams")]
RequestId = Annotated[
    str | None,
    typer.Option("--request-id", metavar="UUID", help="the same id again is the same request, not another"),
]

DEFAULT_SERVER = channel.DEFAULT_ADDRESS


def with_fields(table: type[Any], panel: str) -> Callable[[Command], Command]:
    """Replaces a command's last parameter `fields` (a dict) by one flag a field of the table.

    Flags that are not given are not in the dict: the server's defaults stay the server's.
    """

    def decorate(command: Command) -> Command:
        own = [
            p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "fields"
        ]
        flags = [
            _flag(name, hint, panel) for name, hint in get_type_hints(table, include_extras=True).items()
        ]

        def run(**values: Any) -> Any:
            fields = {flag.name: values.pop(flag.name) for flag in flags}
            return command(**values, fields={name: v for name, v in fields.items() if v not in (None, [])})

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
        return run  # type: ignore[return-value]

    return decorate


def _flag(name: str, hint: Any, panel: str) -> inspect.Parameter:
    kind, text = get_args(hint)
    kebab = f"--{name.replace('_', '-')}"
    declaration = f"{kebab}/--no-{kebab[2:]}" if kind is bool else kebab
    several: Any = list
    value = several[get_args(kind)[0]] if get_origin(kind) is get_origin(Sequence[str]) else kind
    file: dict[str, Any] = {}
    if kind == Controls:
        # One at a time, as --adapter.
        declaration, value, file = kebab.removesuffix("s"), list[str], {"metavar": "NAME=FILE"}
    if kind == PictureFile:
        value, file = Path, {"exists": True, "dir_okay": False, "metavar": "FILE"}
    option = typer.Option(declaration, help=text, rich_help_panel=panel, show_default=False, **file)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[value | None, option]
    )
