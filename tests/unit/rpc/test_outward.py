"""No message that leaves the server holds a scope, and no user's own words are changed."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from atelier.v1 import adapter_pb2, generation_pb2, server_pb2, training_pb2
from atelier_server.access.tenants import Scope
from atelier_server.rpc.outward import VERBATIM, strip

SCOPE = Scope("red")
FILES = (adapter_pb2, generation_pb2, server_pb2, training_pb2)


def filled(message: Message, text: str, depth: int = 0) -> Message:
    """Every text of a message, however deep, set to `text`."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].type == FieldDescriptor.TYPE_STRING:
                value["key"] = text
        elif field.message_type is not None and depth < 4:
            inner = value.add() if field.is_repeated else value
            inner.SetInParent()
            filled(inner, text, depth + 1)
        elif field.type == FieldDescriptor.TYPE_STRING:
            if field.is_repeated:
                value.append(text)
            else:
                setattr(message, field.name, text)
    return message


def texts(message: Message) -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield from ((field.name, item) for item in value.values() if isinstance(item, str))
        elif field.message_type is not None:
            for inner in value if field.is_repeated else (value,):
                yield from texts(inner)
        elif field.type == FieldDescriptor.TYPE_STRING:
            yield from ((field.name, item) for item in (value if field.is_repeated else (value,)))


def responses() -> Iterator[type[Message]]:
    for file in FILES:
        for descriptor in file.DESCRIPTOR.message_types_by_name.values():
            if descriptor.name.endswith("Response"):
                yield from _and_oneofs(file, descriptor)


def _and_oneofs(file: object, descriptor: Descriptor) -> Iterator[type[Message]]:
    yield getattr(file, descriptor.name)


def test_every_text_of_every_answer_is_seen() -> None:
    seen = set()
    for cls in responses():
        # One member of a oneof at a time: filling the next clears the last.
        for field in cls.DESCRIPTOR.fields:
            message = cls()
            inner = getattr(message, field.name)
            if field.message_type is None or field.is_repeated:
                filled(message, "red/otto@5")
            else:
                for deeper in field.message_type.fields:
                    message = cls()
                    inner = getattr(message, field.name)
                    if deeper.message_type is not None and not deeper.is_repeated:
                        filled(getattr(inner, deeper.name), "red/otto@5")
                    else:
                        filled(inner, "red/otto@5")
                    _check(message, seen)
                continue
            _check(message, seen)
    assert {"adapter", "training", "name", "message", "adapters"} <= seen


def _check(message: Message, seen: set[str]) -> None:
    strip(message, SCOPE)
    for name, text in texts(message):
        seen.add(name)
        assert text == ("red/otto@5" if name in VERBATIM else "otto@5"), name


def test_details_of_errors_are_seen() -> None:
    for detail in (
        error_details_pb2.ErrorInfo(metadata={"adapter": "red/otto", "step": "5"}),
        error_details_pb2.ResourceInfo(resource_name="red/otto", description="there is no 'red/otto'"),
        error_details_pb2.BadRequest(field_violations=[{"field": "name", "description": "red/otto is one"}]),
    ):
        strip(detail, SCOPE)
        assert "red/" not in str(detail)


def test_the_default_tenants_answers_stay_as_they_are() -> None:
    message = filled(server_pb2.GetServerInfoResponse(), "red/otto")
    before = message.SerializeToString(deterministic=True)
    strip(message, Scope())
    assert message.SerializeToString(deterministic=True) == before
