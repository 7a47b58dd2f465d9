"""`atelier adapters`: what the server has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from atelier.cli import adapter_report, app, flags, output
from atelier.cli.connection import connect
from atelier.records import Adapter

adapters = app.group("What the server has learned: list, inspect, move.")

Reference = Annotated[str, typer.Argument(metavar="REF", help="NAME, NAME@STEP or NAME@TAG")]


@adapters.command("list")
def list_(
    *,
    all_versions: Annotated[bool, typer.Option("--all-versions", help="not only the newest")] = False,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """List adapters by name."""
    with connect(server) as client:
        found = list(client.list_adapters(all_versions=all_versions))
    if json:
        output.print_json({"adapters": [output.record(adapter) for adapter in found]})
        return
    table = Table("name", "version", "recommended", "steps", "rank", "trigger", "created", box=None)
    for adapter in found:
        steps = ", ".join(str(checkpoint.step) for checkpoint in adapter.checkpoints)
        recommended = f"{adapter.name}@{adapter.recommended_step}" if adapter.checkpoints else "-"
        version, created = f"v{adapter.version}", output.day(adapter.create_time)
        table.add_row(adapter.name, version, recommended, steps, str(adapter.rank), adapter.trigger, created)
    Console().print(table)


@adapters.command()
def show(
    adapter: Reference, *, server: flags.Server = flags.DEFAULT_SERVER, json: flags.Json = False
) -> None:
    """Describe one version with all its checkpoints."""
    with connect(server) as client:
        _show(client.get_adapter(adapter), json)


@adapters.command()
def load(
    adapter: Reference, *, server: flags.Server = flags.DEFAULT_SERVER, json: flags.Json = False
) -> None:
    """Copy a checkpoint into a device slot before it is asked for."""
    with connect(server) as client:
        loaded = client.load_adapter(adapter)
    if json:
        output.print_json(output.record(loaded))
    else:
        output.out(f"{loaded.adapter} {'loaded' if loaded.loaded else 'was loaded already'}")


@adapters.command()
def unload(
    adapter: Reference, *, server: flags.Server = flags.DEFAULT_SERVER, json: flags.Json = False
) -> None:
    """Free an adapter's device slots."""
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
    """Delete an adapter with all its versions, or one version."""
    with connect(server) as client:
        client.delete_adapter(adapter)
    if json:
        output.print_json({})
    else:
        output.out(f"{adapter} deleted")


@adapters.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="a .safetensors file, a folder or a hub's OWNER/NAME[/PATH]")],
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
        Literal["diffusers", "kohya", "peft"], typer.Option(help="how tensors are named")
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


def _show(adapter: Adapter, json: bool) -> None:
    if json:
        output.print_json(output.record(adapter))
        return
    output.out(f"{adapter.name}@v{adapter.version}  {adapter.trigger!r}")
    output.out(f"rank {adapter.rank}, alpha {adapter.lora_alpha:g}, base {adapter.base_model}")
    output.out(f"training {adapter.training or '-'}, {output.day(adapter.create_time)}")
    table = Table("checkpoint", "loss", "size", "resident", "sha256", box=None)
    for checkpoint in adapter.checkpoints:
        mark = "  (recommended)" if checkpoint.step == adapter.recommended_step else ""
        table.add_row(
            f"{adapter.name}@{checkpoint.step}{mark}",
            "-" if checkpoint.loss is None else f"{checkpoint.loss:.4f}",
            output.size(checkpoint.size_bytes),
            "yes" if checkpoint.resident else "",
            checkpoint.sha256[:12],
        )
    Console().print(table)
    if adapter.report is not None:
        output.out("imported:")
        adapter_report.show(adapter.report)
