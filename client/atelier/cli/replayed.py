"""`atelier generate --replay`: the same picture again, and whether it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from atelier.cli import output
from atelier.cli.connection import connect
from atelier.replay import Given, Replayed, replay

_GIVEN = set(Given.__annotations__)


def run(
    server: str,
    file: Path,
    *,
    prompt: str | None,
    adapters: list[str] | None,
    out: Path | None,
    json: bool,
    fields: dict[str, Any],
) -> None:
    """Exit code 0 if every bit is equal, else 1."""
    said = [*([prompt] if prompt is not None else []), *(adapters or []), *(set(fields) - _GIVEN)]
    if said:
        raise typer.BadParameter(
            f"the receipt says it all but {', '.join(sorted(_GIVEN))}; leave out {', '.join(map(str, said))}",
            param_hint="--replay",
        )
    with connect(server) as client:
        again = replay(client, file, **fields)
    if out is not None:
        again.image.save(out)
    _tell(again, file, json)
    if not again.bit_equal:
        raise typer.Exit(1)


def _tell(again: Replayed, file: Path, json: bool) -> None:
    if json:
        told = {
            "file": str(file),
            "bit_equal": again.bit_equal,
            "largest_difference": again.largest_difference,
            "changes": list(again.changes),
            "receipt": output.record(again.receipt),
        }
        output.print_json({"replay": told})
        return
    for change in again.changes:
        output.say(f"not as it was: {change}")
    output.out(
        f"{file}  bit-equal"
        if again.bit_equal
        else f"{file}  differs by up to {again.largest_difference} of 255 in a channel"
    )
