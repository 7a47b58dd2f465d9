"""`atelier generate`: pictures from a prompt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from atelier.cli import flags, hints, output, replayed
from atelier.cli.connection import connect
from atelier.events import Completed, GenerationEvent, Image, Preview, Progress, Queued
from atelier.fields import GenerateFields
from atelier.sheet import contact_sheet

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
SHEET_COLUMNS = 4


@flags.with_fields(GenerateFields, "Request")
def generate(
    prompt: Annotated[str | None, typer.Argument(help="what to paint; may be empty")] = None,
    *,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REF",
            help="NAME[@STEP|@TAG|@vN@STEP], then :WEIGHT, or :FROM..TO over the steps; repeats",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="several pictures get -0, -1, ... (default: out.png)"),
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="also a contact sheet of all pictures")] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="instead of a prompt: paint this picture again from the receipt in it, and compare",
        ),
    ] = None,
    request_id: flags.RequestId = None,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
    fields: dict[str, Any],
) -> None:
    """Paint pictures, or one again. The file format follows the suffix of -o."""
    if replay is not None:
        if request_id is not None:
            raise typer.BadParameter("a replay is another request each time", param_hint="--request-id")
        replayed.run(server, replay, prompt=prompt, adapters=adapter, out=out, json=json, fields=fields)
        return
    if prompt is None:
        raise typer.BadParameter("what is to be painted? (or --replay FILE)", param_hint="PROMPT")
    target = _target(out, fields)
    adapters = adapter or []
    with connect(server) as client:
        client.server_info()  # a wrong address is told at once, not after the time for reconnecting
        for hint in hints.missing_triggers(client, prompt, adapters):
            output.say(hint)
        stream = client.generate_stream(prompt, adapters=adapters, request_id=request_id, **fields)
        several = fields.get("num_images", 1) > 1
        images: list[Image] = []
        with output.Steps("generating", quiet=json) as steps:
            for event in stream:
                if isinstance(event, Image):
                    path = _numbered(target, event.index) if several else target
                    event.save(path)
                    images.append(event)
                    _tell_image(event, path, json)
                elif isinstance(event, Preview):
                    _tell_preview(event, _numbered(target, event.index) if several else target, json)
                else:
                    _tell(event, steps, json)
    if sheet is not None:
        _write_sheet(images, prompt, sheet)
        output.say(f"wrote {sheet}")


def _target(out: Path | None, fields: dict[str, Any]) -> Path:
    """Where to write; puts the format of its suffix into the fields."""
    if out is None:
        return Path("out.png").with_suffix(f".{fields.get('image_format', 'png')}")
    image_format = FORMATS.get(out.suffix.lower())
    if image_format is None:
        raise typer.BadParameter(f"{out.name}: the suffix is none of {', '.join(FORMATS)}", param_hint="-o")
    if fields.setdefault("image_format", image_format) != image_format:
        raise typer.BadParameter(f"{out.name} is not a name for {fields['image_format']}", param_hint="-o")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"{out.parent} is not a folder", param_hint="-o")
    return out


def _numbered(path: Path, index: int) -> Path:
    return path.with_stem(f"{path.stem}-{index}")


def _tell_image(image: Image, path: Path, json: bool) -> None:
    if json:
        output.print_json(
            {"image": {**output.record(image), "size": str(len(image.data)), "path": str(path)}}
        )
    else:
        output.out(f"{path}  seed {image.seed}")


def _tell_preview(preview: Preview, target: Path, json: bool) -> None:
    """Into a file beside the picture's, the next one over it."""
    path = target.with_name(f"{target.stem}.preview.png")
    preview.save(path)
    if json:
        output.print_json({"preview": {**output.record(preview), "path": str(path)}})
    else:
        output.say(f"{path}  step {preview.step}")


def _tell(event: GenerationEvent, steps: output.Steps, json: bool) -> None:
    if json:
        output.print_json({type(event).__name__.lower(): output.record(event)})
    elif isinstance(event, Queued) and event.position:
        output.say(f"queued behind {event.position}")
    elif isinstance(event, Progress):
        steps.update(event.step, event.total)
    elif isinstance(event, Completed):
        output.say(f"done in {event.timings.total_seconds:.2f} s")


def _write_sheet(images: list[Image], prompt: str, path: Path) -> None:
    """Rows of up to four pictures in the order of their seeds."""
    images.sort(key=lambda image: image.index)
    columns = min(SHEET_COLUMNS, math.ceil(math.sqrt(len(images))))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    picture = contact_sheet(
        [[image.data for image in row] for row in rows],
        row_labels=[f"seed {row[0].seed}" for row in rows],
        column_labels=["first", *(f"+{offset}" for offset in range(1, columns))] if columns > 1 else (),
        title=prompt,
    )
    picture.save(path)
