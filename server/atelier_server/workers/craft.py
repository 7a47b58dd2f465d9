"""New adapters out of others, merged, or out of a tuned base; and two of them compared. No device work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.compare import compare
from atelier_server.adapters.extract import extract
from atelier_server.adapters.merge import Ingredient, merge
from atelier_server.core import AdapterUse, CheckpointId
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.families import UnsupportedModel
from atelier_server.diffusion.weights import ModelWeights
from atelier_server.errors import AdapterMismatch, InvalidRequest, Violation
from atelier_server.report import AdapterComparison, PublishAs
from atelier_server.workers.adapters import AdapterFiles


class Craft:
    """Works on the CPU with what the store holds; results are published there."""

    def __init__(self, base: BaseModel, bank: SlotBank, files: AdapterFiles) -> None:
        self._base = base
        self._bank = bank
        self._files = files

    def merge(
        self, uses: Sequence[AdapterUse], rank: int | None, target: PublishAs
    ) -> tuple[CheckpointId, float]:
        """The checkpoint, and the share of the change that is kept. Raises what `adapters.merge` does."""
        ingredients = [Ingredient(_label(use), self._read(use), use.weight) for use in uses]
        merged = merge(ingredients, self._bank.layer, rank=rank, max_rank=self._bank.max_rank)
        self._bank.check(merged.adapter)
        return self._files.publish(merged.adapter, target), merged.kept

    def extract(
        self,
        tuned: str,
        base: str,
        rank: int,
        target: PublishAs,
        progress: Callable[[int, int], None],
        *,
        public: bool,
    ) -> tuple[CheckpointId, float]:
        """`base` "" is the resident one, read from its files: with all the digits that they have.

        `public`: what is named is read only where everybody may.
        """
        ours = self._weights("base", base or self._base.reference, public=public and bool(base))
        theirs = self._weights("tuned", tuned, public=public)
        both = ours.components & theirs.components
        shapes = {
            layer: self._bank.shapes[layer] for layer in self._bank.layers if layer.partition(".")[0] in both
        }
        extracted = extract(theirs, ours, shapes, rank=rank, family=self._base.family.name, progress=progress)
        self._bank.check(extracted.adapter)
        return self._files.publish(extracted.adapter, target), extracted.kept

    def diff(self, a: AdapterUse, b: AdapterUse) -> AdapterComparison:
        return compare(self._read(a), self._read(b), self._bank.layer)

    def _read(self, use: AdapterUse) -> CanonicalAdapter:
        """An adapter that fits the resident base. Raises AdapterMismatch that names it."""
        adapter = self._files.read(use)
        try:
            self._bank.check(adapter)
        except AdapterMismatch as error:
            family = f" of family {adapter.family}" if adapter.family else ""
            raise AdapterMismatch(
                f"{_label(use)}{family} does not fit the resident base, which is {self._base.family.name}: "
                f"{error.message}",
                error.metadata,
            ) from error
        return adapter

    def _weights(self, field: str, reference: str, *, public: bool) -> ModelWeights:
        try:
            return ModelWeights.of(reference, self._base.unet.config, public=public)
        except (UnsupportedModel, OSError, ValueError, KeyError) as error:
            raise InvalidRequest.of(
                [Violation(field, f"model {reference!r} cannot be read: {error}")]
            ) from error


def _label(use: AdapterUse) -> str:
    """As its user calls it."""
    return str(use.checkpoint).rpartition("/")[2]
