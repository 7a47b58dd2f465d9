"""The command line. Prints what the SDK tells; no logic of its own."""

from __future__ import annotations

from atelier.cli import app
from atelier.cli.adapters import adapters
from atelier.cli.craft import diff, extract, merge
from atelier.cli.demo import demo
from atelier.cli.generate import generate
from atelier.cli.info import info
from atelier.cli.labels import note, tag, undelete, untag
from atelier.cli.serve import serve
from atelier.cli.token import token
from atelier.cli.train import train
from atelier.cli.trainings import trainings

cli = app.group("Teach a subject, paint it: personalised diffusion models over gRPC.")
# Nothing of `serve` is ours, not even --help: all goes to the server.
cli.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)(serve)
for command in (demo, train, generate, info):
    cli.command()(command)
for label in (tag, untag, note, undelete):
    adapters.command()(label)
for making in (merge, extract, diff):
    adapters.command()(making)
cli.add_typer(adapters, name="adapters")
cli.add_typer(trainings, name="trainings")
cli.add_typer(token, name="token")


def main() -> None:
    """The entry point `atelier`."""
    app.listen()
    cli()
