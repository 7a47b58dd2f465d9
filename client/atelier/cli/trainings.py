"""`atelier trainings`: trainings of the past, the present and the queue."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from atelier import recipe
from atelier.cli import app, flags, output
from atelier.cli.connection import connect
from atelier.cli.train import SamplesFolder, follow
from atelier.records import Training

trainings = app.group("Trainings: list, watch, stop, go on.")

Id = Annotated[str, typer.Argument(metavar="TRAINING", help="its id, or an adapter's name: the latest of it")]


@trainings.command("list")
def list_(*, server: flags.Server = flags.DEFAULT_SERVER, json: flags.Json = False) -> None:
    """List trainings, newest first."""
    with connect(server) as client:
        found = list(client.list_trainings())
    if json:
        output.print_json({"trainings": [output.record(training) for training in found]})
        return
    table = Table("training", "adapter", "state", "step", "loss", "created", box=None)
    for training in found:
        step = f"{training.step}/{training.recipe.get('max_train_steps', '?')}"
        adapter, created = f"{training.adapter}@v{training.version}", output.day(training.create_time)
        table.add_row(training.id, adapter, training.state, step, f"{training.loss:.4f}", created)
    Console().print(table)


@trainings.command()
def show(
    training: Id,
    *,
    toml: Annotated[
        bool, typer.Option("--toml", help="its recipe alone, for `atelier train --recipe`")
    ] = False,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Describe a training."""
    with connect(server) as client:
        found = client.get_training(training)
    if toml:
        output.out(recipe.dump(found.recipe).removesuffix("\n"))
    else:
        _show(found, json)


@trainings.command()
def watch(
    training: Id,
    *,
    after_seq: Annotated[int, typer.Option(help="only events after this number")] = 0,
    samples: SamplesFolder = None,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
) -> None:
    """Follow a training: the events that have been, then those to come. Ctrl-C leaves it running."""
    with connect(server) as client:
        events = client.watch_training(training, after_seq=after_seq)
        follow(events, server, json=json, samples=samples, training=training)


@trainings.command()
def cancel(training: Id, *, server: flags.Server = flags.DEFAULT_SERVER, json: flags.Json = False) -> None:
    """Stop a training and keep what it has learned."""
    with connect(server) as client:
        _show(client.cancel_training(training), json)


@trainings.command()
def pause(training: Id, *, server: flags.Server = flags.DEFAULT_SERVER, json: flags.Json = False) -> None:
    """Stop a training for now and keep what it has learned; `resume` goes on."""
    with connect(server) as client:
        _show(client.pause_training(training), json)


@trainings.command()
def resume(training: Id, *, server: flags.Server = flags.DEFAULT_SERVER, json: flags.Json = False) -> None:
    """Queue a paused, cancelled or failed training again, from its last checkpoint."""
    with connect(server) as client:
        _show(client.resume_training(training), json)


@trainings.command()
def delete(training: Id, *, server: flags.Server = flags.DEFAULT_SERVER, json: flags.Json = False) -> None:
    """Delete a training's record, pictures and samples; its adapter stays."""
    with connect(server) as client:
        client.delete_training(training)
    if json:
        output.print_json({})
    else:
        output.out(f"{training} deleted")


def _show(training: Training, json: bool) -> None:
    if json:
        output.print_json(output.record(training))
        return
    output.out(f"{training.id}  {training.adapter}@v{training.version}  {training.state}")
    output.out(f"step {training.step}, loss {training.loss:.4f}, {training.last_seq} events")
    if training.reason:
        output.out(f"{training.reason}: {training.message}")
    for folder in training.kept_bases:
        output.out(f"full weights: atelier serve --model {folder}")
    for name, value in training.recipe.items():
        output.out(f"  {name}: {value}")
