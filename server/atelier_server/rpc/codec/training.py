"""TrainRequest.Start to TrainingDraft, records and logged events to their messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from atelier.v1 import training_pb2 as pb
from atelier_server.config import Limits
from atelier_server.core import BaseInfo, State
from atelier_server.errors import TrainingNotFound
from atelier_server.jobs.records import (
    Accepted,
    Checkpointed,
    Completed,
    LoggedEvent,
    Progressed,
    Restarted,
    Sampled,
    TrainingDraft,
    TrainingRecord,
    Warned,
)
from atelier_server.rpc import caller
from atelier_server.rpc.codec.checks import Checks
from atelier_server.rpc.codec.recipe import decode_recipe, encode_recipe, hashed
from atelier_server.rpc.codec.times import timestamp

_STATES = {state: pb.TrainingState.Value(f"TRAINING_STATE_{state.name}") for state in State}


def decode_start(start: pb.TrainRequest.Start, limits: Limits, base: BaseInfo) -> TrainingDraft:
    """Fills in every default. Raises InvalidRequest with every violation."""
    checks = Checks()
    message = start.recipe
    request_id = checks.request_id("start.request_id", start.request_id)
    name = checks.name("recipe.name", message.name)
    checks.integer("recipe.num_images", message.num_images, 1, limits.max_train_images)
    recipe = decode_recipe(checks, message, limits, base)
    checks.done()
    body = [message.name, message.new_version, message.num_images, hashed(message, recipe)]
    return TrainingDraft(
        request_id=request_id,
        name=name,
        new_version=message.new_version,
        recipe=recipe,
        num_images=message.num_images,
        recipe_hash=hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(),
    )


def decode_training(text: str) -> str:
    """The id of a training, or an adapter's name, as it is inside. Raises TrainingNotFound.

    What has a slash is none of anybody's names: it would reach into another scope.
    """
    if "/" in text:
        raise TrainingNotFound(f"there is no training {text[:100]!r}", name=text[:100])
    return caller.scope().enter(text)


# ---------------------------------------------------------------------------------------------- answers
def encode_training(record: TrainingRecord, bases: Sequence[Path] = ()) -> pb.Training:
    message = pb.Training(
        id=record.id,
        adapter=record.adapter,
        version=record.version,
        state=_STATES[record.state],
        step=record.step,
        loss=record.loss,
        recipe=_encode_recipe(record),
        last_seq=record.last_seq,
        create_time=timestamp(record.create_time),
        reason=record.reason,
        message=record.message,
        kept_bases=[str(path) for path in bases],
    )
    if record.end_time is not None:
        message.end_time.CopyFrom(timestamp(record.end_time))
    return message


def _encode_recipe(record: TrainingRecord) -> pb.TrainingRecipe:
    message = encode_recipe(record.recipe)
    message.name, message.new_version = record.adapter, record.new_version
    message.num_images = len(record.images)
    return message


def encode_event(event: LoggedEvent, picture: bytes = b"") -> pb.TrainingEvent:
    """`picture` is the file of a sample."""
    message = pb.TrainingEvent(seq=event.seq, training=event.training, create_time=timestamp(event.time))
    match event.payload:
        case Accepted(adapter, version, seconds, size):
            message.accepted.CopyFrom(
                pb.TrainingEvent.Accepted(
                    training=event.training,
                    adapter=adapter,
                    version=version,
                    estimated_seconds=seconds,
                    estimated_bytes=size,
                )
            )
        case Progressed() as payload:
            message.progress.CopyFrom(pb.TrainingEvent.Progress(**asdict(payload)))
        case Checkpointed() as payload:
            message.checkpoint.CopyFrom(pb.TrainingEvent.CheckpointPublished(**asdict(payload)))
        case Sampled() as payload:
            fields = {key: value for key, value in asdict(payload).items() if key != "file"}
            message.sample.CopyFrom(pb.TrainingEvent.Sample(**fields, data=picture))
        case Warned() as payload:
            message.warning.CopyFrom(pb.TrainingEvent.Warning(**asdict(payload)))
        case Restarted() as payload:
            message.restarted.CopyFrom(pb.TrainingEvent.Restarted(**asdict(payload)))
        case Completed(state, step, adapter, seconds, reason, text):
            message.completed.CopyFrom(
                pb.TrainingEvent.Completed(
                    state=_STATES[state],
                    step=step,
                    adapter=adapter,
                    seconds=seconds,
                    reason=reason,
                    message=text,
                )
            )
    return message
