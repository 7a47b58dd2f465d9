"""What a trainer asks of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.leaves import LeafSet
from atelier_server.adapters.words import Words
from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.parts import Part, Phase

NOTHING = LeafSet({})


class Method(ABC):
    """One training's. After `begin` everything below is there; a checkpoint's weights are then written into
    the parameters, and its `constants` taken, before anything is learned.

    `leaves` are what the U-Net's forward has, `text_leaves` what the text encoders' have.
    """

    parts: Sequence[Part]
    phases: Sequence[Phase]
    leaves: LeafSet = NOTHING
    text_leaves: LeafSet = NOTHING
    shares: bool = True
    """Whether its rows may be in one forward with those of others: not those of a U-Net of its own."""
    heard_by: BaseModel | None = None
    """The base whose text encoders hear the captions, where it is not the resident one."""

    def __init__(self, recipe: Recipe, denoiser: Denoiser) -> None:
        self.recipe = recipe
        self.denoiser = denoiser
        """Of the U-Net that is trained: the resident one, unless the method has another."""

    @abstractmethod
    def begin(self) -> None:
        """Makes the first weights. Raises InvalidRequest for what the base cannot do."""

    @abstractmethod
    def adapter(self) -> CanonicalAdapter:
        """What was learned, with the weights of now: a copy on the CPU."""

    def extracting(self) -> Iterator[None]:
        """What `adapter` would take long for, in small pieces."""
        yield from ()

    @property
    def kept_share(self) -> float | None:
        """How much of what was learned is in `adapter`, where that is not all of it."""
        return None

    @property
    def full_modules(self) -> Mapping[str, nn.Module]:
        """Whole components of the base that were learned, by name: worth a base of their own."""
        return {}

    def words(self) -> Words:
        """The tokens that captions may use, within the graph."""
        return Words()

    def enter(self, phase: Phase) -> None:  # noqa: B027 - most have one
        """Called when a phase begins, or goes on from a checkpoint."""

    def hears(self, phase: Phase) -> bool:
        """Whether captions become something else with each step of a phase."""
        return any(part != "unet" for part in phase.parts)

    def after_step(self, phase: Phase) -> None:  # noqa: B027 - most have nothing to do
        """Called when the optimizer has stepped."""

    def constants(self) -> Mapping[str, Tensor]:
        """Tensors that are made at the beginning and that every checkpoint needs; they do not learn."""
        return {}

    def take_constants(self, constants: Mapping[str, Tensor]) -> None:  # noqa: B027 - few have any
        """Those of a checkpoint, in place of its own. Raises KeyError where one is missing."""
