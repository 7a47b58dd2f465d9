"""How adapters are shown: a table, one in full, a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from rich.console import Console
from rich.table import Table

from atelier.cli import adapter_report, output
from atelier.records import Adapter
from atelier.sheet import Layout, contact_sheet

_COLUMNS = 6
_WIDTH = 200
# Told with the other fields, or no part of how it was learned.
_NOT_RECIPE = {"name", "instance_prompt", "new_version", "num_images"}


def table(adapters: Sequence[Adapter]) -> Table:
    """A line an adapter."""
    columns = ("name", "version", "recommended", "trigger", "tags", "size")
    made = Table(*columns, "tier", "last used", "created", box=None)
    for adapter in adapters:
        recommended = (
            f"{adapter.name}@v{adapter.version}@{adapter.recommended_step}" if adapter.checkpoints else "-"
        )
        tags = ", ".join(tag for tag in adapter.tags if tag != f"v{adapter.version}")
        made.add_row(
            adapter.name,
            f"v{adapter.version}",
            recommended,
            adapter.trigger,
            tags,
            output.size(adapter.size_bytes),
            state(adapter),
            output.day(adapter.last_used_time),
            output.day(adapter.create_time),
        )
    return made


def print_table(made: Table) -> None:
    """As wide as the terminal; wide enough for every column where the reader is another program."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(made)


def state(adapter: Adapter) -> str:
    """Where it lies; or what is the matter with it."""
    if adapter.damaged:
        return "damaged"
    if adapter.expire_time is not None:
        return f"deleted, kept until {output.day(adapter.expire_time)}"
    pinned = any(checkpoint.pinned for checkpoint in adapter.checkpoints)
    return _tier(adapter.tier, pinned=pinned)


def show(adapter: Adapter) -> None:
    """One version with all that is known of it."""
    output.out(f"{adapter.name}@v{adapter.version}  {adapter.trigger!r}")
    base = f"{adapter.base_model} ({adapter.family})" if adapter.family else adapter.base_model
    output.out(f"rank {adapter.rank}, alpha {adapter.lora_alpha:g}, base {base}")
    output.out(f"training {adapter.training or '-'}, {output.day(adapter.create_time)}")
    if adapter.damaged:
        output.out("damaged: import the same content again to heal it, or delete it")
    if adapter.note:
        output.out(f"note: {adapter.note}")
    made = Table("checkpoint", "tags", "loss", "size", "tier", "last used", "sha256", box=None)
    for checkpoint in adapter.checkpoints:
        mark = "  (recommended)" if checkpoint.step == adapter.recommended_step else ""
        made.add_row(
            f"{adapter.name}@v{adapter.version}@{checkpoint.step}{mark}",
            ", ".join(checkpoint.tags),
            "-" if checkpoint.loss is None else f"{checkpoint.loss:.4f}",
            output.size(checkpoint.size_bytes),
            "damaged" if checkpoint.damaged else _tier(checkpoint.tier, pinned=checkpoint.pinned),
            output.day(checkpoint.last_used_time),
            checkpoint.sha256[:12],
        )
    print_table(made)
    recipe = {name: value for name, value in adapter.recipe.items() if name not in _NOT_RECIPE}
    if recipe:
        output.out("recipe: " + ", ".join(f"{name} {_short(value)}" for name, value in recipe.items()))
    if adapter.report is not None:
        output.out("imported:")
        adapter_report.show(adapter.report)


def sheet(adapters: Sequence[Adapter]) -> Image.Image:
    """Their thumbnails with their names; an empty frame for one without. ValueError if there are none."""
    rows = [adapters[start : start + _COLUMNS] for start in range(0, len(adapters), _COLUMNS)]
    return contact_sheet(
        [[adapter.thumbnail or None for adapter in row] for row in rows],
        captions=[[f"{a.name} v{a.version}" for a in row] for row in rows],
        layout=Layout(cell=128, label_size=15),
    )


def _tier(tier: str, *, pinned: bool) -> str:
    return ("-" if tier == "unspecified" else tier) + (" (pinned)" if pinned else "")


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "; ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
