"""TrainRequest.Start to TrainingDraft, records and logged events to their messages."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from atelier.v1 import training_pb2 as pb
from atelier_server.config import Limits
from atelier_server.core import BaseInfo, Recipe, State
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
from atelier_server.rpc.codec.times import timestamp

LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
METHODS = ("lora",)
MAX_VALIDATION_PROMPTS = 16
# Fields of TrainingRecipe that are Recipe's, and have a default there.
_OPTIONAL = (
    "method",
    "max_train_steps",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "train_batch_size",
    "rank",
    "lora_alpha",
    "resolution",
    "random_crop",
    "random_flip",
    "seed",
    "checkpointing_steps",
    "validation_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "gradient_checkpointing",
    "snr_gamma",
    "caption_dropout",
)
_MAX_LEARNING_RATE = 1e30
_MAX_SNR_GAMMA = 1e6
_STATES = {state: pb.TrainingState.Value(f"TRAINING_STATE_{state.name}") for state in State}


def decode_start(start: pb.TrainRequest.Start, limits: Limits, base: BaseInfo) -> TrainingDraft:
    """Fills in every default. Raises InvalidRequest with every violation."""
    checks = Checks()
    message = start.recipe
    given = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}  # type: ignore[arg-type]
    given.setdefault("resolution", min(base.native_width, base.native_height))
    given.setdefault("lora_alpha", float(max(given.get("rank", Recipe("", 0).rank), 1)))
    recipe = Recipe(
        instance_prompt=message.instance_prompt, validation_prompts=tuple(message.validation_prompts), **given
    )
    request_id = checks.request_id("start.request_id", start.request_id)
    name = checks.name("recipe.name", message.name)
    checks.integer("recipe.num_images", message.num_images, 1, limits.max_train_images)
    _check_recipe(checks, recipe, limits)
    _check_optimizer(checks, recipe)
    if base.inpainting:
        checks.refuse("recipe.method", "this base is an inpainting model: it paints, and is not taught here")
    checks.done()
    body = json.dumps([message.name, message.new_version, message.num_images, asdict(recipe)], sort_keys=True)
    return TrainingDraft(
        request_id=request_id,
        name=name,
        new_version=message.new_version,
        recipe=recipe,
        num_images=message.num_images,
        recipe_hash=hashlib.sha256(body.encode()).hexdigest(),
    )


def _check_recipe(checks: Checks, recipe: Recipe, limits: Limits) -> None:
    checks.text("recipe.instance_prompt", recipe.instance_prompt, limits.max_prompt_characters, empty=False)
    checks.choice("recipe.method", recipe.method, METHODS)
    checks.integer("recipe.max_train_steps", recipe.max_train_steps, 1, limits.max_train_steps)
    checks.integer("recipe.train_batch_size", recipe.train_batch_size, 1, limits.max_train_batch_size)
    checks.integer("recipe.rank", recipe.rank, 1, limits.max_lora_rank)
    checks.number("recipe.lora_alpha", recipe.lora_alpha, 0.0, open_low=True)
    checks.size("recipe.resolution", recipe.resolution, min(limits.max_width, limits.max_height))
    checks.integer("recipe.checkpointing_steps", recipe.checkpointing_steps, 1, 2**31 - 1)
    checks.integer("recipe.validation_steps", recipe.validation_steps, 1, limits.max_inference_steps)
    if len(recipe.validation_prompts) > MAX_VALIDATION_PROMPTS:
        checks.refuse(
            "recipe.validation_prompts",
            f"{len(recipe.validation_prompts)} prompts are more than {MAX_VALIDATION_PROMPTS}",
        )
    for i, prompt in enumerate(recipe.validation_prompts[:MAX_VALIDATION_PROMPTS]):
        checks.text(f"recipe.validation_prompts[{i}]", prompt, limits.max_prompt_characters)
    checks.number("recipe.caption_dropout", recipe.caption_dropout, 0.0, 1.0)


def _check_optimizer(checks: Checks, recipe: Recipe) -> None:
    # The limit is what float32 holds: a rate that turns the loss to NaN stops the training at that step.
    checks.number("recipe.learning_rate", recipe.learning_rate, 0.0, _MAX_LEARNING_RATE, open_low=True)
    checks.choice("recipe.lr_scheduler", recipe.lr_scheduler, LR_SCHEDULERS)
    checks.integer("recipe.lr_warmup_steps", recipe.lr_warmup_steps, 0, max(recipe.max_train_steps, 0))
    for field in ("adam_beta1", "adam_beta2"):
        value = getattr(recipe, field)
        if not 0.0 <= value < 1.0:
            checks.refuse(f"recipe.{field}", f"{value} is not at least 0 and below 1")
    checks.number("recipe.adam_weight_decay", recipe.adam_weight_decay, 0.0)
    checks.number("recipe.adam_epsilon", recipe.adam_epsilon, 0.0, open_low=True)
    checks.number("recipe.max_grad_norm", recipe.max_grad_norm, 0.0, open_low=True)
    if recipe.snr_gamma is not None:
        checks.number("recipe.snr_gamma", recipe.snr_gamma, 0.0, _MAX_SNR_GAMMA, open_low=True)


def decode_training(text: str) -> str:
    """The id of a training, or an adapter's name, as it is inside. Raises TrainingNotFound.

    What has a slash is none of anybody's names: it would reach into another scope.
    """
    if "/" in text:
        raise TrainingNotFound(f"there is no training {text[:100]!r}", name=text[:100])
    return caller.scope().enter(text)


# ---------------------------------------------------------------------------------------------- answers
def encode_training(record: TrainingRecord) -> pb.Training:
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
    )
    if record.end_time is not None:
        message.end_time.CopyFrom(timestamp(record.end_time))
    return message


def _encode_recipe(record: TrainingRecord) -> pb.TrainingRecipe:
    recipe = record.recipe
    values = {name: getattr(recipe, name) for name in _OPTIONAL}
    return pb.TrainingRecipe(
        name=record.adapter,
        instance_prompt=recipe.instance_prompt,
        new_version=record.new_version,
        num_images=len(record.images),
        validation_prompts=recipe.validation_prompts,
        **{name: value for name, value in values.items() if value is not None},
    )


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
