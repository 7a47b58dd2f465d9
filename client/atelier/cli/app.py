"""The Typer application's shape: groups that turn errors into exit codes."""

from __future__ import annotations

import logging
from typing import Any

import typer
from typer.core import TyperGroup

from atelier.cli import output
from atelier.errors import AtelierError


class Commands(TyperGroup):
    """Exit 0 done, 1 refused or failed, 2 usage; no traceback for what a server or a file system says."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AtelierError as error:
            output.print_error(error)
        except BrokenPipeError:
            pass  # the reader of our output has gone, e.g. `| head`
        except (OSError, ValueError) as error:
            output.say(f"error: {error}")
        raise typer.Exit(1)


class _Said(logging.Handler):
    """What the SDK has to say about a lost connection, on stderr as it is now."""

    def emit(self, record: logging.LogRecord) -> None:
        output.say(record.getMessage())


def group(text: str) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(cls=Commands, help=text, no_args_is_help=True, add_completion=False)


def listen() -> None:
    """Lets the user read what the SDK logs."""
    logger = logging.getLogger("atelier")
    if not any(isinstance(handler, _Said) for handler in logger.handlers):
        logger.addHandler(_Said())
