"""All of the client's logic that is not waiting: requests out of arguments, events out of responses.

Both transports use it; nothing here knows a channel.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from atelier import fields, recipe, transfer, wire
from atelier.control import Control
from atelier.events import Completed, GenerationEvent, GenerationResult, Image, TrainingEvent
from atelier.recipe import RecipeSource
from atelier.records import TrainingImage
from atelier.selection import Adapters, Selection, steps_of
from atelier.v1 import adapter_pb2, generation_pb2, training_pb2

_RANGES = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}


def generate_request(
    prompt: str,
    adapters: Adapters,
    request_id: str | None,
    values: Mapping[str, object],
) -> generation_pb2.GenerateRequest:
    """A request that can be repeated: it has an id, and a seed even if the caller has none.

    The seed is drawn here so that a request which a restarted server has to paint anew gives the same
    pictures.
    """
    fields.check("generate", values, fields.GenerateFields.__annotations__)
    request = generation_pb2.GenerateRequest(request_id=request_id or str(uuid.uuid4()))
    chosen = [adapters] if isinstance(adapters, str | Selection) else adapters
    steps = steps_of(values)
    for one in chosen:
        request.adapters.append((Selection.of(one, steps) if isinstance(one, str) else one).message())
    fill(request, {"seed": None, **values, "prompt": prompt})
    if not request.HasField("seed"):
        request.seed = secrets.randbits(32)
    return request


def train_start(
    num_images: int,
    *,
    source: RecipeSource | None,
    request_id: str | None,
    cancel_on_disconnect: bool,
    values: Mapping[str, object],
) -> training_pb2.TrainRequest.Start:
    """The first message of a Train stream; `num_images` pictures have to follow it.

    `values` that are not None take the place of what the recipe `source` says. TypeError, RecipeError.
    """
    fields.check("train", values, recipe.KINDS)
    given = {name: value for name, value in values.items() if value is not None}
    message = training_pb2.TrainingRecipe(num_images=num_images)
    merged = {**recipe.load(source), **given}
    for name in ("name", "instance_prompt"):
        if name not in merged:
            raise TypeError(f"train() needs {name}, as a keyword or in its recipe")
    fill(message, merged)
    return training_pb2.TrainRequest.Start(
        request_id=request_id or str(uuid.uuid4()), recipe=message, cancel_on_disconnect=cancel_on_disconnect
    )


def train_requests(
    start: training_pb2.TrainRequest.Start, images: Sequence[TrainingImage]
) -> Iterator[training_pb2.TrainRequest]:
    """The whole upload, in chunks of at most 1 MiB."""
    yield training_pb2.TrainRequest(start=start)
    for index, image in enumerate(images):
        for number, data in enumerate(transfer.chunks(image.data)):
            chunk = training_pb2.TrainRequest.ImageChunk(index=index, data=data)
            if number == 0:
                chunk.filename, chunk.caption = image.filename, image.caption
                chunk.size_bytes = len(image.data)
            yield training_pb2.TrainRequest(image=chunk)


class AdapterImport:
    """The import of a file, a folder or a hub repository."""

    def __init__(self, source: str | Path, name: str, values: Mapping[str, object]) -> None:
        fields.check("import_adapter", values, fields.ImportFields.__annotations__)
        self._upload = transfer.AdapterUpload.of(source)
        self._metadata = adapter_pb2.ImportAdapterRequest.Metadata()
        fill(self._metadata, {**values, "name": name})
        if self._upload is None:
            self._metadata.hub_id = str(source)
            return
        self._metadata.size_bytes, self._metadata.sha256 = self._upload.size_bytes, self._upload.sha256
        self._metadata.files.extend(
            adapter_pb2.ImportAdapterRequest.File(name=file, size_bytes=size)
            for file, size in self._upload.names
        )

    def query(self) -> adapter_pb2.QueryUploadRequest | None:
        """Asks how much of it is there already; None where it is not worth a call."""
        if self._metadata.size_bytes <= transfer.CHUNK_BYTES:
            return None
        return adapter_pb2.QueryUploadRequest(
            sha256=self._metadata.sha256, size_bytes=self._metadata.size_bytes
        )

    def requests(self, offset: int = 0) -> Iterator[adapter_pb2.ImportAdapterRequest]:
        """What it is, then chunks of at most 1 MiB from that byte on."""
        self._metadata.offset = offset
        yield adapter_pb2.ImportAdapterRequest(metadata=self._metadata)
        for data in self._upload.chunks(offset) if self._upload else ():
            yield adapter_pb2.ImportAdapterRequest(chunk=data)


def list_request(values: Mapping[str, object]) -> adapter_pb2.ListAdaptersRequest:
    """The first page's."""
    fields.check("list_adapters", values, fields.ListFields.__annotations__)
    request = adapter_pb2.ListAdaptersRequest()
    fill(request, values)
    return request


def time_of(message: Message, field: str) -> datetime | None:
    """A timestamp of a message; None if it is absent."""
    return wire.decode_time(getattr(message, field)) if message.HasField(field) else None


def export_request(adapter: str, layout: str) -> adapter_pb2.ExportAdapterRequest:
    request = adapter_pb2.ExportAdapterRequest()
    fill(request, {"adapter": adapter, "format": layout.replace("-", "_")})
    return request


def training_images(
    images: Sequence[TrainingImage | str | Path | bytes] | None, folder: str | Path | None
) -> list[TrainingImage]:
    """The pictures of a folder with their captions, or those given; exactly one of the two."""
    if (images is None) == (folder is None):
        raise TypeError("train() takes either images or folder")
    if folder is not None:
        return transfer.read_folder(folder)
    return [transfer.training_image(image) for image in images or ()]


def training_event(message: training_pb2.TrainingEvent) -> TrainingEvent | None:
    """The event; None for a kind that this client does not know yet."""
    kind = message.WhichOneof("event")
    if kind is None:
        return None
    create_time = wire.decode_time(message.create_time) if message.HasField("create_time") else None
    told = getattr(message, kind)
    event: TrainingEvent = wire.decode(
        wire.record_of(told), told, seq=message.seq, training=message.training, create_time=create_time
    )
    return event


def result(events: Sequence[GenerationEvent], completed: Completed) -> GenerationResult:
    """What a whole stream of events amounts to."""
    images = sorted((event for event in events if isinstance(event, Image)), key=lambda image: image.index)
    return GenerationResult(
        tuple(images), completed.seed, completed.timings, completed.batch_bucket, completed.receipt
    )


def fill(message: Message, values: Mapping[str, object]) -> None:
    """Sets the fields that have a value; a TypeError or ValueError names the field that does not take it."""
    for name, value in values.items():
        if value is not None:
            try:
                _assign(message, name, value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}={value!r:.200}: {error}") from None
            except OSError as error:
                raise ValueError(f"{name}={value!r:.200}: {error.strerror}") from None


def _assign(message: Message, name: str, value: Any) -> None:
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.enum_type is not None:
        setattr(message, name, wire.number_of(field.enum_type, value))
    elif name == "controlnets":
        getattr(message, name).extend(one.message() for one in Control.several(value))
    elif field.is_repeated:
        getattr(message, name).extend([value] if isinstance(value, str) else value)
    elif field.type == field.TYPE_BYTES:
        setattr(message, name, transfer.picture_bytes(value))
    else:
        low, high = _RANGES.get(field.type, (value, value))
        if isinstance(value, int) and not low <= value <= high:
            raise ValueError(f"is not between {low} and {high}")
        setattr(message, name, value)
