"""`atelier adapters`: what the server has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from atelier.cli import adapter_report, app, flags, library, output
from atelier.cli.connection import connect
from atelier.fields import AdapterFormat, ListFields

adapters = app.group("What the server has learned: list, inspect, move.")

Reference = Annotated[str, typer.Argument(metavar="REF", help="NAME, NAME@STEP, NAME@TAG or NAME@vN@STEP")]


@adapters.command("list")
@flags.with_fields(ListFields, "Which, and in which order")
def list_(
    *,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="also a contact sheet of their thumbnails, PNG")
    ] = None,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
    fields: dict[str, Any],
) -> None:
    """List adapters by name."""
    if sheet is not None:
        fields = {"view": "thumbnails", **fields}
    with connect(server) as client:
        found = list(client.list_adapters(**fields))
    if sheet is not None:
        library.sheet(found).save(sheet, "PNG")
    if json:
        output.print_json({"adapters": [output.record(adapter) for adapter in found]})
    else:
        library.print_table(library.table(found))


@adapters.command()
def show(
    adapter: Reference, *, server: flags.Server = flags.DEFAULT_SERVER, json: flags.Json = False
) -> None:
    """Describe one version with all its checkpoints."""
    with connect(server) as client:
        found = client.get_adapter(adapter)
    if json:
        output.print_json(output.record(found))
    else:
        library.show(found)


@adapters.command()
def load(
    adapter: Reference,
    *,
    pin: Annotated[bool, typer.Option("--pin", help="never evict it, until it is unloaded")] = False,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Copy a checkpoint into a device slot before it is asked for."""
    with connect(server) as client:
        loaded = client.load_adapter(adapter, pin=pin)
    if json:
        output.print_json(output.record(loaded))
    else:
        output.out(f"{loaded.adapter} {'loaded' if loaded.loaded else 'was loaded already'}")


@adapters.command()
def unload(
    adapter: Reference, *, server: flags.Server = flags.DEFAULT_SERVER, json: flags.Json = False
) -> None:
    """Free an adapter's device slots, pinned or not."""
    with connect(server) as client:
        unloaded = client.unload_adapter(adapter)
    if json:
        output.print_json({"unloaded": unloaded})
    else:
        output.out(f"{unloaded} freed")


@adapters.command()
def delete(
    adapter: Annotated[str, typer.Argument(metavar="REF", help="NAME, or NAME@vN for one version")],
    *,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Delete an adapter with all its versions, or one version. `adapters undelete` brings it back."""
    with connect(server) as client:
        until = client.delete_adapter(adapter)
    if json:
        output.print_json({"expire_time": f"{until:%Y-%m-%dT%H:%M:%SZ}"} if until else {})
    else:
        kept = f"; `atelier adapters undelete {adapter}` brings it back until {output.day(until)}"
        output.out(f"{adapter} deleted{kept if until else ''}")


@adapters.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(help="a .safetensors file, a folder or a hub's OWNER/NAME or OWNER/NAME/PATH")
    ],
    *,
    name: Annotated[str, typer.Option(help="of the adapter")],
    new_version: Annotated[bool, typer.Option("--new-version", help="where the name exists already")] = False,
    trigger: Annotated[str, typer.Option(help="words that call the subject up")] = "",
    placeholder: Annotated[str, typer.Option(help="the word for its learned token in prompts")] = "",
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="take what fits of a file that does not fit as a whole")
    ] = False,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Publish an adapter from any tool's files, and say what was understood."""
    with connect(server) as client:
        imported = client.import_adapter(
            source,
            name,
            new_version=new_version,
            trigger=trigger,
            placeholder=placeholder,
            allow_partial=allow_partial,
        )
    if json:
        output.print_json(output.record(imported))
    else:
        reference = f"{imported.adapter.name}@v{imported.adapter.version}"
        output.out(f"{reference}: {imported.matched_modules} layers, {imported.detected_format} layout")
        if imported.report is not None:
            adapter_report.show(imported.report)


@adapters.command()
def export(
    adapter: Reference,
    *,
    out: Annotated[Path, typer.Option("-o", "--output", help="the safetensors file to write")],
    format: Annotated[
        AdapterFormat, typer.Option(help="how tensors are named; textual-inversion: the token alone")
    ] = "diffusers",
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Write a checkpoint as one safetensors file."""
    with connect(server) as client:
        exported = client.export_adapter(adapter, out, format)
    if json:
        output.print_json({**output.record(exported), "path": str(exported.path)})
    else:
        output.out(f"{exported.path}  {exported.adapter}  {output.size(exported.size_bytes)}")
