"""What leaves the server reads as its reader wrote it: names of a tenant's things without their scope."""

from __future__ import annotations

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from atelier_server.access.tenants import Scope

# What users wrote themselves stays to the letter; every other text may hold a name.
VERBATIM = frozenset(
    [
        *("prompt", "negative_prompt", "instance_prompt", "class_prompt", "validation_prompts"),
        *("trigger", "triggers", "caption", "note", "placeholder", "tag", "tags"),
        *("base_model", "reference", "hub_id", "software"),
    ]
)


def strip(message: Message, scope: Scope) -> None:
    """Takes the scope off every name in a message, in place. Nothing to do for the default tenant."""
    if not scope.tenant:
        return
    for field, value in message.ListFields():
        if _is_map(field):
            for key in [key for key in value if isinstance(value[key], str)]:
                value[key] = scope.leave(value[key])
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if field.is_repeated else (value,):
                strip(inner, scope)
        elif field.type == FieldDescriptor.TYPE_STRING and field.name not in VERBATIM:
            if field.is_repeated:
                value[:] = [scope.leave(text) for text in value]
            else:
                setattr(message, field.name, scope.leave(value))


def _is_map(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and kind.GetOptions().map_entry
