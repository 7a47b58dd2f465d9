"""`atelier adapters tag|untag|note|undelete`: what may change about an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from atelier.cli import flags, output
from atelier.cli.adapters import Reference
from atelier.cli.connection import connect

Expected = Annotated[
    str | None,
    typer.Option(metavar="vN@STEP", help='only if the tag is on that now, e.g. v1@750; "" for not set'),
]


def tag(
    adapter: Reference,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="e.g. production; NAME@TAG means it then")],
    *,
    expected: Expected = None,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Put a tag on a checkpoint, or move it there."""
    with connect(server) as client:
        previous = client.tag_adapter(adapter, tag, expected=expected)
    if json:
        output.print_json({"previous": previous})
    else:
        name = adapter.partition("@")[0]
        output.out(f"{name}@{tag} is {adapter}" + (f", was {name}@{previous}" if previous else ""))


def untag(
    tagged: Annotated[str, typer.Argument(metavar="NAME@TAG", help="the adapter and its tag")],
    *,
    expected: Expected = None,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Take a tag away."""
    name, _, tag = tagged.partition("@")
    with connect(server) as client:
        previous = client.untag_adapter(name, tag, expected=expected)
    if json:
        output.print_json({"previous": previous})
    else:
        output.out(f"{tagged} removed, was {name}@{previous}")


def note(
    adapter: Reference,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="in place of the one before; empty removes it")],
    *,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Write a note on a version."""
    with connect(server) as client:
        found = client.annotate_adapter(adapter, text)
    if json:
        output.print_json(output.record(found))
    else:
        output.out(f"{found.name}@v{found.version}: {found.note or 'no note'}")


def undelete(
    adapter: Annotated[str, typer.Argument(metavar="REF", help="NAME, or NAME@vN for one version")],
    *,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Bring back what has been deleted; `adapters list --view deleted` shows what can be."""
    with connect(server) as client:
        found = client.undelete_adapter(adapter)
    if json:
        output.print_json({"adapters": [output.record(one) for one in found]})
    else:
        output.out("\n".join(f"{one.name}@v{one.version} is back" for one in found))
