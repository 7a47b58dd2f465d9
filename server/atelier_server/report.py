"""Imports' terms and reports, comparisons of adapters: nouns as in `core`, free of torch, protobuf, gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class ImportTerms:
    """On what terms a file is taken: what its user says of it. `placeholder` names its one learned token.

    `allow_partial` takes what fits of a file of which less than `min_coverage` (0..1) fits.
    """

    trigger: str = ""
    placeholder: str = ""
    allow_partial: bool = False
    min_coverage: float = 1.0


@dataclass(frozen=True, slots=True)
class PublishAs:
    """What an adapter that is made here becomes: a first or next version, with the words that call it up."""

    name: str
    new_version: bool
    trigger: str


@dataclass(frozen=True, slots=True)
class UnmatchedPart:
    """Something in an adapter's file that the base takes no change from: its name there, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class TokenReport:
    """A learned token: its placeholder, and how many vectors which text encoders have."""

    placeholder: str
    vectors: int
    encoders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What an import understood of a file. Facts about the file, except where a field says otherwise.

    `confidence`: the share of tensors that are named in `format`. `family` with `evidence` is told by names,
    shapes or the header, "" where nothing tells; whether a file fits is decided by its modules alone.
    `kinds`, `ranks`, `alphas`: how many modules of each. `norms`: of the change (Frobenius), by block.
    `coverage`: matched of all; below 1 the adapter was accepted in part. `probe`: how far the U-Net's output
    moves, relative to its size; None where it was not measured. `difference_bytes`: what whole differences of
    layers take on the device, beside the slot.
    """

    format: str
    confidence: float
    software: str
    family: str
    evidence: str
    base_family: str
    matched: tuple[str, ...]
    unmatched: tuple[UnmatchedPart, ...]
    coverage: float
    kinds: tuple[tuple[str, int], ...]
    ranks: tuple[tuple[int, int], ...]
    alphas: tuple[tuple[float, int], ...]
    tokens: tuple[TokenReport, ...]
    triggers: tuple[str, ...]
    metadata: tuple[tuple[str, str], ...]
    norms: tuple[tuple[str, float], ...]
    probe: float | None = None
    difference_bytes: int = 0

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Self:
        """From what `dataclasses.asdict` and JSON made of one. Raises KeyError, TypeError, ValueError."""
        pairs = {
            name: tuple((pair[0], pair[1]) for pair in value[name])
            for name in ("kinds", "ranks", "alphas", "metadata", "norms")
        }
        texts = {name: tuple(value[name]) for name in ("matched", "triggers")}
        unmatched = tuple(UnmatchedPart(**part) for part in value["unmatched"])
        tokens = tuple(
            TokenReport(token["placeholder"], token["vectors"], tuple(token["encoders"]))
            for token in value["tokens"]
        )
        return cls(**{**value, **pairs, **texts, "unmatched": unmatched, "tokens": tokens})


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """A module that two adapters change in different forms. Kind "lora", "dora" or "full"; rank 0 is full."""

    name: str
    kind_a: str
    rank_a: int
    alpha_a: float
    kind_b: str
    rank_b: int
    alpha_b: float


@dataclass(frozen=True, slots=True)
class BlockComparison:
    """Frobenius norms of two changes and of their difference. `cosine` is None where one of them is zero."""

    block: str
    norm_a: float
    norm_b: float
    norm_difference: float
    cosine: float | None


@dataclass(frozen=True, slots=True)
class AdapterComparison:
    """Two adapters side by side. `only_a`, `only_b`: modules that the other does not change."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    common: int
    differing: tuple[ModuleComparison, ...]
    blocks: tuple[BlockComparison, ...]
    whole: BlockComparison
