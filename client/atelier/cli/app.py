"""The Typer application's shape: groups that turn errors into exit codes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

from atelier.cli import output
from atelier.cli.connection import with_connection
from atelier.errors import AtelierError

Command = TypeVar("Command", bound=Callable[..., Any])

_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


class Commands(TyperGroup):
    """Exit 0 done, 1 refused or failed, 2 usage, 130 Ctrl-C; no traceback for what servers or files do."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AtelierError as error:
            output.print_error(error)
        except BrokenPipeError:
            pass  # the reader of our output has gone, e.g. `| head`
        except KeyboardInterrupt:
            output.say("stopped")
            raise typer.Exit(_INTERRUPTED) from None
        except (OSError, ValueError) as error:
            output.say(f"error: {error}")
        raise typer.Exit(1)


class _Said(logging.Handler):
    """What the SDK has to say about a lost connection, on stderr as it is now."""

    def emit(self, record: logging.LogRecord) -> None:
        output.say(record.getMessage())


class App(typer.Typer):
    """Commands that talk to a server get the flags of a connection."""

    def command(self, *args: Any, **kwargs: Any) -> Callable[[Command], Command]:
        register = super().command(*args, **kwargs)

        def decorate(command: Command) -> Command:
            register(with_connection(command))
            return command

        return decorate


def group(text: str) -> App:
    """A group of commands."""
    return App(cls=Commands, help=text, no_args_is_help=True, add_completion=False)


def listen() -> None:
    """Lets the user read what the SDK logs."""
    logger = logging.getLogger("atelier")
    if not any(isinstance(handler, _Said) for handler in logger.handlers):
        logger.addHandler(_Said())
