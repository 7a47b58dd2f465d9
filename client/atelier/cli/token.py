"""`atelier token`: tokens for a server's tokens file. Talks to no server."""

from __future__ import annotations

import hashlib
import json as jsonlib
import re
import secrets
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from atelier.cli import app, flags, output

PREFIX = "atl_"
SHORTEST = 32  # as the server has it
TENANT = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}

token = app.group("Tokens for a server's --tokens-file.")


@token.callback()
def _group() -> None:
    """One command is a group's only one; `new` stays a word of its own."""


@token.command()
def new(
    tenant: Annotated[str, typer.Argument(help="whose it is; `default` owns what was made without tokens")],
    *,
    expires: Annotated[str, typer.Option(help="90d, 12h, 30m, or a date: 2027-01-31; else never")] = "",
    note: Annotated[str, typer.Option(help="for people: what it is for", show_default=False)] = "",
    append: Annotated[
        Path | None, typer.Option(metavar="FILE", help="add it to this tokens file", show_default=False)
    ] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="take your own token, do not make one")] = False,
    json: flags.Json = False,
) -> None:
    """Make a token. It is shown once, on stdout; the server's file gets only its digest."""
    if not TENANT.fullmatch(tenant):
        raise typer.BadParameter(f"{tenant!r} does not match {TENANT.pattern}", param_hint="TENANT")
    made = sys.stdin.readline().strip() if stdin else PREFIX + secrets.token_urlsafe(32)
    if len(made) < SHORTEST:
        raise typer.BadParameter(f"a token needs {SHORTEST} characters or more", param_hint="--stdin")
    entry = _entry(tenant, made, _end(expires), note)
    if append is not None:
        with append.open("a", encoding="utf-8") as file:
            file.write(f"\n{entry}")
        output.say(f"added to {append}; a running server reads it by itself")
    if json:
        output.print_json({"tenant": tenant, "token": made, "entry": entry})
        return
    output.out(made)
    if append is None:
        output.say(f"\nappend this to the server's tokens file:\n\n{entry}")


def _entry(tenant: str, made: str, end: datetime | None, note: str) -> str:
    lines = ["[[token]]", f'tenant = "{tenant}"', f'sha256 = "{hashlib.sha256(made.encode()).hexdigest()}"']
    if end is not None:
        lines.append(f"expires = {end.isoformat(timespec='seconds').replace('+00:00', 'Z')}")
    if note:
        # JSON's escapes are TOML's.
        lines.append(f"note = {jsonlib.dumps(note, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _end(text: str) -> datetime | None:
    """When a token made now expires."""
    if not text:
        return None
    if span := re.fullmatch(r"([0-9]{1,5})([dhm])", text):
        return datetime.now(UTC) + timedelta(**{_UNITS[span[2]]: int(span[1])})
    try:
        end = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither 90d nor 2027-01-31", param_hint="--expires") from None
    return end if end.tzinfo else end.replace(tzinfo=UTC)
