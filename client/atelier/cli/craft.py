"""`atelier adapters merge|extract|diff`: new adapters out of others, and two of them compared."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer
from rich.table import Table

from atelier.cli import flags, library, output
from atelier.cli.connection import connect
from atelier.records import AdapterDiff, ExtractedAdapter, MergedAdapter

Name = Annotated[str, typer.Option(help="of the new adapter")]
NewVersion = Annotated[bool, typer.Option("--new-version", help="where the name exists already")]
Trigger = Annotated[str, typer.Option(help="words that call the subject up")]
_SHOWN = 10


def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="REF...", help="NAME[@STEP|@TAG|@vN@STEP][:WEIGHT]")
    ],
    *,
    name: Name,
    rank: Annotated[
        int | None, typer.Option(help="the largest rank of the result (default: exact, ranks add up)")
    ] = None,
    new_version: NewVersion = False,
    trigger: Trigger = "",
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Publish the weighted sum of several adapters as one."""
    with connect(server) as client:
        merged = client.merge_adapters(adapters, name, rank=rank, new_version=new_version, trigger=trigger)
    _made(merged, json)


def extract(
    *,
    tuned: Annotated[str, typer.Option(metavar="REF", help="the tuned model, as `serve --model` takes it")],
    base: Annotated[
        str, typer.Option(metavar="REF", help="what it was tuned from (default: the server's)")
    ] = "",
    name: Name,
    rank: Annotated[int, typer.Option(help="of the new adapter")],
    new_version: NewVersion = False,
    trigger: Trigger = "",
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Publish the difference of two models as an adapter."""
    with connect(server) as client, output.Steps("extract", quiet=json) as steps:
        extracted = client.extract_adapter(
            tuned,
            name,
            rank,
            base=base,
            new_version=new_version,
            trigger=trigger,
            progress=lambda done, total: steps.update(done, total, "layers"),
        )
    _made(extracted, json)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="NAME, NAME@STEP, NAME@TAG or NAME@vN@STEP")],
    b: Annotated[str, typer.Argument(metavar="B", help="NAME, NAME@STEP, NAME@TAG or NAME@vN@STEP")],
    *,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Compare two adapters: what they change, by how much, and how alike the changes are."""
    with connect(server) as client:
        found = client.diff_adapters(a, b)
    if json:
        output.print_json(output.record(found))
        return
    output.out(
        f"{found.common} modules in both, {len(found.only_a)} only in {found.a}, "
        f"{len(found.only_b)} only in {found.b}"
    )
    _names(f"only in {found.a}", found.only_a)
    _names(f"only in {found.b}", found.only_b)
    forms = Counter(
        f"{_form(m.kind_a, m.rank_a, m.alpha_a)} and {_form(m.kind_b, m.rank_b, m.alpha_b)}"
        for m in found.differing
    )
    for form, modules in forms.most_common():
        output.out(f"in different forms: {modules} as {form}")
    library.print_table(_table(found))


def _made(made: MergedAdapter | ExtractedAdapter, json: bool) -> None:
    if json:
        output.print_json(output.record(made))
        return
    adapter = made.adapter
    output.out(f"{adapter.name}@v{adapter.version}: rank {adapter.rank}, {made.kept:.2%} of the change kept")


def _names(heading: str, names: list[str] | tuple[str, ...]) -> None:
    if names:
        more = f", and {len(names) - _SHOWN} more (--json lists them all)" if len(names) > _SHOWN else ""
        output.out(f"{heading}: {', '.join(names[:_SHOWN])}{more}")


def _form(kind: str, rank: int, alpha: float) -> str:
    return f"{kind} of rank {rank}, alpha {alpha:g}" if rank else "a full difference"


def _table(found: AdapterDiff) -> Table:
    made = Table("block", f"norm of {found.a}", f"norm of {found.b}", "of the difference", "cosine", box=None)
    for block in (*found.blocks, found.whole):
        made.add_row(
            block.block or "all",
            f"{block.norm_a:.4g}",
            f"{block.norm_b:.4g}",
            f"{block.norm_difference:.4g}",
            "-" if block.cosine is None else f"{block.cosine:.4f}",
        )
    return made
