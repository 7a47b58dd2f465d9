"""Messages of the contract to records and back, by the names of their fields.

The records are shaped like the messages, so one table of types and one rule a kind of field do for all: a
repeated field is a tuple, a map a dict, a timestamp an aware datetime, an enum its bare lower-case word, an
unset optional field None.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from atelier import events, records
from atelier.v1 import adapter_pb2, generation_pb2, server_pb2, training_pb2

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")
# protobuf's descriptors have two classes each, pure Python's and upb's; the stubs know both.
Field: TypeAlias = Any
Enum: TypeAlias = Any

MESSAGES: dict[type[Any], type[Message]] = {
    events.Queued: generation_pb2.GenerateResponse.Queued,
    events.Progress: generation_pb2.GenerateResponse.Progress,
    events.Preview: generation_pb2.GenerateResponse.Preview,
    events.Image: generation_pb2.GenerateResponse.Image,
    events.Completed: generation_pb2.GenerateResponse.Completed,
    events.Timings: generation_pb2.Timings,
    events.Receipt: generation_pb2.Receipt,
    events.ReceiptAdapter: generation_pb2.Receipt.Adapter,
    events.ReceiptControlNet: generation_pb2.Receipt.ControlNet,
    events.TrainingAccepted: training_pb2.TrainingEvent.Accepted,
    events.TrainingProgress: training_pb2.TrainingEvent.Progress,
    events.CheckpointPublished: training_pb2.TrainingEvent.CheckpointPublished,
    events.Sample: training_pb2.TrainingEvent.Sample,
    events.TrainingWarning: training_pb2.TrainingEvent.Warning,
    events.TrainingRestarted: training_pb2.TrainingEvent.Restarted,
    events.TrainingCompleted: training_pb2.TrainingEvent.Completed,
    records.Training: training_pb2.Training,
    records.Adapter: adapter_pb2.Adapter,
    records.Checkpoint: adapter_pb2.Checkpoint,
    records.AdapterReport: adapter_pb2.AdapterReport,
    records.UnmatchedPart: adapter_pb2.AdapterReport.Unmatched,
    records.KindCount: adapter_pb2.AdapterReport.Kind,
    records.RankCount: adapter_pb2.AdapterReport.Rank,
    records.AlphaCount: adapter_pb2.AdapterReport.Alpha,
    records.LearnedToken: adapter_pb2.AdapterReport.Token,
    records.BlockNorm: adapter_pb2.AdapterReport.BlockNorm,
    records.LoadedAdapter: adapter_pb2.LoadAdapterResponse,
    records.ImportedAdapter: adapter_pb2.ImportAdapterResponse,
    records.ExportedAdapter: adapter_pb2.ExportAdapterResponse.Metadata,
    records.MergedAdapter: adapter_pb2.MergeAdaptersResponse,
    records.ExtractedAdapter: adapter_pb2.ExtractAdapterResponse.Completed,
    records.AdapterDiff: adapter_pb2.DiffAdaptersResponse,
    records.ModuleDiff: adapter_pb2.DiffAdaptersResponse.Module,
    records.BlockDiff: adapter_pb2.DiffAdaptersResponse.Block,
    records.ServerInfo: server_pb2.GetServerInfoResponse,
    records.ControlNet: server_pb2.ControlNet,
    records.BaseModel: server_pb2.BaseModel,
    records.Device: server_pb2.Device,
    records.Limits: server_pb2.Limits,
    records.AdapterSlots: server_pb2.AdapterSlots,
    records.Quotas: server_pb2.Quotas,
}
_RECORDS = {message.DESCRIPTOR.full_name: record for record, message in MESSAGES.items()}


def record_of(message: Message) -> type[Any]:
    """The class of records that this message decodes to."""
    return _RECORDS[message.DESCRIPTOR.full_name]


def decode(kind: type[Record], message: Message, **more: Any) -> Record:
    """The record of a message; `more` are fields of the record that the message does not have."""
    known = message.DESCRIPTOR.fields_by_name
    wanted = {field.name: field.default is None for field in fields(kind) if field.name in known}
    return kind(
        **more,
        **{
            name: _read(message, known[name], optional)
            for name, optional in wanted.items()
            if name not in more
        },
    )


def decode_time(time: Timestamp) -> datetime:
    return time.ToDatetime(tzinfo=UTC)


def encode(record: Any) -> Message:
    """The message of a record. Fields that only one of the two has are left out."""
    message = MESSAGES[type(record)]()
    for field in message.DESCRIPTOR.fields:
        value = getattr(record, field.name, None)
        if value is not None:
            _write(message, field, value)
    return message


def word_of(enum: Enum, number: int) -> str:
    """TRAINING_STATE_FAILED is "failed"; a number that this client does not know is "unspecified"."""
    value = enum.values_by_number.get(number, enum.values[0])
    return str(value.name).removeprefix(_prefix(enum)).lower()


def number_of(enum: Enum, word: str) -> int:
    """The number of "failed"; ValueError naming what there is."""
    known: dict[str, int] = {word_of(enum, value.number): value.number for value in enum.values}
    if word not in known:
        choices = ", ".join(name for name, number in known.items() if number)
        raise ValueError(f"{word!r} is none of {choices}")
    return known[word]


def _prefix(enum: Enum) -> str:
    """buf's STANDARD: every value begins with the enum's name, the zero is _UNSPECIFIED."""
    return str(enum.values[0].name).removesuffix("UNSPECIFIED")


def _read(message: Message, field: Field, optional: bool) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    absent = field.has_presence and not message.HasField(field.name)
    if absent and (optional or field.message_type is None or isinstance(value, Timestamp)):
        return None
    return _list(field, value)


def _plain(field: Field, value: Any) -> Any:
    if field.enum_type is not None:
        word = word_of(field.enum_type, value)
        states = field.enum_type.full_name == training_pb2.TrainingState.DESCRIPTOR.full_name
        return events.TrainingState(word) if states else word
    if isinstance(value, Timestamp):
        return decode_time(value)
    if isinstance(value, training_pb2.TrainingRecipe):
        return {part.name: _list(part, item) for part, item in value.ListFields()}
    return decode(record_of(value), value) if isinstance(value, Message) else value


def _list(field: Field, value: Any) -> Any:
    return tuple(_plain(field, item) for item in value) if field.is_repeated else _plain(field, value)


def _write_recipe(message: Message, values: dict[str, Any]) -> None:
    """In place; an empty one is none: an adapter that was not taught here has no recipe."""
    for name, value in values.items():
        _write(message, message.DESCRIPTOR.fields_by_name[name], value)


def _write(message: Message, field: Field, value: Any) -> None:
    if field.enum_type is not None:
        setattr(message, field.name, number_of(field.enum_type, value))
    elif isinstance(value, datetime):
        getattr(message, field.name).FromDatetime(value)
    elif is_dataclass(value):
        getattr(message, field.name).CopyFrom(encode(value))
    elif isinstance(value, tuple | list):
        getattr(message, field.name).extend([encode(v) if is_dataclass(v) else v for v in value])
    elif field.message_type is training_pb2.TrainingRecipe.DESCRIPTOR:
        _write_recipe(getattr(message, field.name), value)
    elif field.message_type is not None:
        getattr(message, field.name).update(value)  # a map
    else:
        setattr(message, field.name, value)
