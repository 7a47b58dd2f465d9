"""What the book holds: trainings, and the events of their log, as frozen dataclasses.

An event's kind is its class; its fields are stored as JSON. Pictures are stored as files, by name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from atelier_server.core import Priority, Recipe, State


@dataclass(frozen=True, slots=True)
class TrainingDraft:
    """A validated request to train, before its pictures have come. `recipe_hash` covers all its fields."""

    request_id: str
    name: str
    new_version: bool
    recipe: Recipe
    num_images: int
    recipe_hash: str
    warnings: tuple[Warned, ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """An uploaded picture: the name of its file in the training's `images` folder, and its caption."""

    file: str
    caption: str


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """One training as written down. Times are seconds since the epoch.

    `interruption` says why it has to be announced as restarted when it is next submitted, "" if it has
    not run yet. `crash_count` counts crashes in a row at `crash_step`.
    """

    id: str
    request_id: str
    recipe_hash: str
    images_hash: str
    adapter: str
    version: int
    new_version: bool
    recipe: Recipe
    images: tuple[Picture, ...]
    create_time: float
    state: State = State.QUEUED
    step: int = 0
    loss: float = 0.0
    last_seq: int = 0
    crash_step: int = -1
    crash_count: int = 0
    interruption: str = ""
    cancel_requested: bool = False
    end_time: float | None = None
    reason: str = ""
    message: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    number: int = 0


# --------------------------------------------------------------------------------------- kinds of events
@dataclass(frozen=True, slots=True)
class Accepted:
    adapter: str
    version: int
    estimated_seconds: float
    estimated_bytes: int


@dataclass(frozen=True, slots=True)
class Progressed:
    step: int
    max_train_steps: int
    loss: float
    learning_rate: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Checkpointed:
    step: int
    adapter: str
    sha256: str
    size_bytes: int
    loss: float
    validation_loss: float | None = None
    kept_share: float | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """`file` lies in the training's `samples` folder."""

    step: int
    index: int
    prompt: str
    seed: int
    mime_type: str
    file: str


@dataclass(frozen=True, slots=True)
class Warned:
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Restarted:
    from_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Completed:
    state: State
    step: int
    adapter: str
    seconds: float
    reason: str = ""
    message: str = ""
    metadata: tuple[tuple[str, str], ...] = field(default=())


Payload = Accepted | Progressed | Checkpointed | Sampled | Warned | Restarted | Completed
_KINDS: dict[str, type[Payload]] = {
    "accepted": Accepted,
    "progress": Progressed,
    "checkpoint": Checkpointed,
    "sample": Sampled,
    "warning": Warned,
    "restarted": Restarted,
    "completed": Completed,
}
_NAMES = {cls: name for name, cls in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """One line of a training's log; `seq` counts from 1 without gaps."""

    training: str
    seq: int
    time: float
    payload: Payload


def kind_of(payload: Payload) -> str:
    return _NAMES[type(payload)]


def dump(value: Any) -> str:
    """A dataclass, or a tuple of them, as JSON."""
    plain = [asdict(item) for item in value] if isinstance(value, tuple) else asdict(value)
    return json.dumps(plain)


def load_payload(kind: str, text: str) -> Payload:
    content = json.loads(text)
    cls = _KINDS[kind]
    if cls is Completed:
        content["state"] = State(content["state"])
        content["metadata"] = tuple((key, value) for key, value in content["metadata"])
    return cls(**content)


def load_recipe(text: str) -> Recipe:
    """A recipe as it was stored; fields that have appeared since get their defaults."""
    content = json.loads(text)
    known = {item.name for item in fields(Recipe)}
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
    }
    values["priority"] = Priority(values.get("priority", Priority.NORMAL))
    return Recipe(**{key: value for key, value in values.items() if key in known})


def load_pictures(text: str) -> tuple[Picture, ...]:
    return tuple(Picture(**item) for item in json.loads(text))
