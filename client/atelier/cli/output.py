"""What the commands print: records as JSON or words, errors, progress.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from atelier import wire
from atelier.errors import AtelierError
from atelier.events import TrainingEvent
from atelier.v1 import adapter_pb2, training_pb2

_TRAINING_KINDS = {
    field.message_type.full_name: field.name
    for field in training_pb2.TrainingEvent.DESCRIPTOR.fields
    if field.message_type is not None and field.containing_oneof is not None
}


# What gRPC says where one side speaks TLS and the other does not.
_NO_TLS = ("socket closed", "connection reset", "handshake")


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def out(text: str) -> None:
    """A line on stdout."""
    print(text, flush=True)


def as_dict(message: Message) -> dict[str, Any]:
    """Protobuf's JSON with the proto's field names; fields without a value are there, too."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def record(value: Any) -> dict[str, Any]:
    """A record as its message's JSON, without the bytes of pictures."""
    message = wire.encode(value)
    for adapter in (message, getattr(message, "adapter", None)):
        if isinstance(adapter, adapter_pb2.Adapter):
            adapter.ClearField("thumbnail")
    if "data" in message.DESCRIPTOR.fields_by_name:
        message.ClearField("data")
        return {name: v for name, v in as_dict(message).items() if name not in ("data", "offset", "last")}
    return as_dict(message)


def training_event(event: TrainingEvent, **more: object) -> dict[str, Any]:
    """A training's event as TrainingEvent's JSON: seq, training, create_time and one of the kinds."""
    shared = training_pb2.TrainingEvent(seq=event.seq, training=event.training)
    if event.create_time is not None:
        shared.create_time.FromDatetime(event.create_time)
    kind = _TRAINING_KINDS[wire.MESSAGES[type(event)].DESCRIPTOR.full_name]
    return {**as_dict(shared), kind: {**record(event), **more}}


def print_json(value: dict[str, Any]) -> None:
    out(json.dumps(value, ensure_ascii=False))


def print_error(error: AtelierError) -> None:
    """The error and every violation on a line of its own."""
    listed = "; ".join(f"{v.field}: {v.description}" for v in error.violations)
    # A long message comes cut; the violations are whole.
    told = listed.startswith(error.message[:100]) if listed else False
    heading = str(error).removesuffix(error.message) if told else f"{error} "
    say(f"error: {heading.rstrip(': ') if told else heading.rstrip()}")
    for violation in error.violations:
        say(f"  {violation.field}: {violation.description}")
    if error.retry_after:
        say(f"  try again in {error.retry_after:g} s")
    if not error.reason and any(words in error.message.lower() for words in _NO_TLS):
        say("  does one side speak TLS and the other not, or not trust it? see --tls, --tls-ca, --tls-cert")


def duration(seconds: float) -> str:
    """75 is "1 min 15 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or f"{seconds:.1f} s"


def size(count: int) -> str:
    """1536 is "1.5 KiB"."""
    amount, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    for larger in units:
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.3g} {unit}"


def day(time: datetime | None) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M") if time else "-"


class Steps:
    """Steps done of steps in all: a bar on a terminal, a line every twentieth otherwise, nothing if quiet."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._what = what
        self._quiet = quiet
        self._told = -1
        self._task: TaskID | None = None
        self._bar: Progress | None = None
        if console.is_terminal and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), console=console)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, total: int, note: str = "") -> None:
        words = f"{step}/{total}  {note}".rstrip()
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._what, note=words)
            self._bar.update(self._task, completed=step, total=total, note=words)
        elif not self._quiet and (part := 20 * step // max(total, 1)) != self._told:
            self._told = part
            say(f"{self._what}  {words}")
