"""Logs of front and worker: one line a record, JSON for machines, text for a terminal.

Every line tells which call, training and adapter it is about, where that is known. What a user wrote (a
prompt, a caption) and what a user keeps secret (a token) is not logged at level info or above.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, TextIO

from pythonjsonlogger.json import JsonFormatter

from atelier_server import origin

Format = Literal["auto", "text", "json"]
# What a line may be about, beside its message; in text they stand at its end.
FIELDS = (
    "request_id",
    "trace_id",
    "tenant",
    "training",
    "adapter",
    "job",
    "method",
    "code",
    "reason",
    "fields",
    "source",
    "seconds",
)
_ABOUT: ContextVar[dict[str, str]] = ContextVar("about")


@contextmanager
def about(**fields: str) -> Iterator[None]:
    """Every line that is logged meanwhile, in this thread, has these fields (see FIELDS)."""
    token = _ABOUT.set({**_ABOUT.get({}), **fields})
    try:
        yield
    finally:
        _ABOUT.reset(token)


def resolve(wanted: Format, stream: TextIO) -> Literal["text", "json"]:
    """`auto` is text where somebody reads along, JSON where a machine does."""
    if wanted == "auto":
        return "text" if stream.isatty() else "json"
    return wanted


def configure(wanted: Format, level: str, process: str, stream: TextIO | None = None) -> None:
    """Sends all logs of this process to `stream` (default: stderr). `process`: "front" or "worker"."""
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_json(process) if resolve(wanted, stream) == "json" else _Text(process))
    handler.addFilter(_fill)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def _fill(record: logging.LogRecord) -> bool:
    """Adds what the thread or task is about, where the record does not say so itself."""
    came_from = origin.current()
    known = {"request_id": came_from.request_id, "trace_id": came_from.trace_id, **_ABOUT.get({})}
    for name, value in known.items():
        if value and not hasattr(record, name):
            setattr(record, name, value)
    return True


def _json(process: str) -> logging.Formatter:
    return JsonFormatter(
        ["timestamp", "levelname", "name", "message"],
        rename_fields={"levelname": "level", "name": "logger"},
        static_fields={"process": process},
        timestamp=True,
    )


class _Text(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        said = [f"{name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name)]
        return super().formatMessage(record) + (f" [{' '.join(said)}]" if said else "")
