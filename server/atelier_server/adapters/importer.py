"""The door of the wardrobe: any adapter file of the ecosystem becomes the canonical form, and a report.

Keys are split into modules and parts (`formats.parts`), modules found in the resident base by name
(`formats.names`), their parts made one change (`kinds`). Nothing is dropped silently: what the base takes no
change from is in the report with the reason, and below the coverage that the caller sets the file is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from atelier_server.adapters.canonical import CanonicalAdapter, Module, finite, tensors_of
from atelier_server.adapters.formats import header
from atelier_server.adapters.formats.container import Container, open_source
from atelier_server.adapters.formats.embeddings import (
    LearnedToken,
    fitted,
    is_output_vector,
    learned_token,
)
from atelier_server.adapters.formats.names import ModuleNames, Spelled
from atelier_server.adapters.formats.parts import Key, foreign
from atelier_server.adapters.formats.peft import PeftConfig, configs_of
from atelier_server.adapters.kinds import convert
from atelier_server.adapters.report import counted, family_of, norms, tokens_of
from atelier_server.adapters.shapes import same_shape, shape_fault, shaped
from atelier_server.errors import AdapterMismatch, UnsupportedFormat
from atelier_server.report import AdapterReport, ImportTerms, UnmatchedPart

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STRICT = ImportTerms()
_TOKENS = "textual-inversion"
_MOST_LISTED, _MOST_CHARACTERS = 1000, 200
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


@dataclass(frozen=True)
class Base:
    """What a file has to fit: shapes of the weights by module, widths of the text encoders, vocabulary."""

    family: str
    shapes: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    max_rank: int
    is_word: Callable[[str], bool]

    @classmethod
    def of(
        cls,
        family: str,
        components: Mapping[str, nn.Module],
        *,
        max_rank: int,
        is_word: Callable[[str], bool],
    ) -> Base:
        """The base whose U-Net and text encoders are `components`, by name ("unet", "text_encoder", ...)."""
        shapes = {
            f"{component}.{name}": tuple(module.weight.shape)
            for component, root in components.items()
            for name, module in root.named_modules()
            if isinstance(getattr(module, "weight", None), Tensor) and not isinstance(module, nn.Embedding)
        }
        widths = {
            component: int(cast(Any, root).config.hidden_size)
            for component, root in components.items()
            if component != "unet"
        }
        return cls(family, shapes, widths, max_rank, is_word)

    @cached_property
    def names(self) -> ModuleNames:
        return ModuleNames(self.shapes)


def import_file(
    path: Path, base: Base, terms: ImportTerms = _STRICT, name: str = "token"
) -> tuple[CanonicalAdapter, AdapterReport]:
    """Reads a file or folder of any layout for `base`; `name` is a learned token's that nobody names.

    Raises UnsupportedFormat for what is no adapter in safetensors, AdapterMismatch for one that does not fit;
    both name the first offender.
    """
    reading = _Reading(base, terms, name)
    for container in open_source(path):
        reading.add(container)
    return reading.finish()


@dataclass(slots=True)
class _Layer:
    """A module of the file: its parts, and what its file's configuration says of its alpha."""

    spelled: Spelled
    label: str
    parts: dict[str, Tensor] = field(default_factory=dict)
    config: PeftConfig | None = None


class _Reading:
    """One import, as far as it has come."""

    def __init__(self, base: Base, terms: ImportTerms, name: str) -> None:
        self._base = base
        self._terms = terms
        self._name = name
        self._layers: dict[str, _Layer] = {}  # by real name
        self._tokens: list[LearnedToken] = []
        self._unmatched: dict[str, str] = {}
        self._layouts: Counter[str] = Counter()
        self._metadata: dict[str, str] = {}
        self._keys: list[str] = []
        self._downs: dict[str, Tensor] = {}

    # -------------------------------------------------------------------------------------------- reading
    def add(self, container: Container) -> None:
        if not container.tensors:
            raise UnsupportedFormat(f"{container.name} holds no tensors")
        configs = configs_of(container)
        self._metadata |= container.metadata
        self._keys += container.tensors
        for label, spelled, parts in self._modules(container):
            self._downs[label] = parts.get("lora_down.weight", torch.empty(0))
            name = self._base.names.find(spelled)
            if name is None:
                self._unmatched[label] = "the base model has no such module"
                continue
            component = name.partition(".")[0]
            layer = self._layers.setdefault(name, _Layer(spelled, label))
            layer.config = configs.get(component, configs.get("", layer.config))
            for part, tensor in parts.items():
                if part in layer.parts:
                    raise UnsupportedFormat(f"{label} repeats the {part} of {name}", {"module": name})
                layer.parts[part] = tensor

    def _modules(self, container: Container) -> Iterator[tuple[str, Spelled, dict[str, Tensor]]]:
        """The modules of a file as they are spelled there; learned tokens and the unknown are put aside."""
        found: dict[str, dict[str, Tensor]] = {}
        for name in sorted(container.tensors):
            tensor = container.tensors[name]
            key = Key.of(name)
            if key is not None:
                _check_dtype(name, tensor, key.part == "alpha")
                if found.setdefault(key.module, {}).setdefault(key.part, tensor) is not tensor:
                    raise UnsupportedFormat(f"{name} repeats the {key.part} of {key.module}", {"key": name})
            elif token := learned_token(name, tensor, len(container.tensors)):
                _check_dtype(name, tensor, False)
                self._tokens.append(token)
                self._layouts[_TOKENS] += 1
            else:
                reason = "shifts an encoder's outputs" if is_output_vector(name) else foreign(name)
                self._unmatched[name] = reason
        for module, parts in found.items():
            spelled = Spelled.of(module)
            if container.component and not spelled.component:
                spelled = Spelled(container.component, spelled.layout, spelled.name)
            self._layouts[spelled.layout] += len(parts)
            yield module, spelled, parts

    # ------------------------------------------------------------------------------------------ finishing
    def finish(self) -> tuple[CanonicalAdapter, AdapterReport]:
        if not self._layouts:
            raise UnsupportedFormat(f"{self._keys[0]} {foreign(self._keys[0])}", {"key": self._keys[0]})
        modules, kinds = self._convert()
        tokens = self._named_tokens()
        family, evidence = family_of(self._downs, self._keys, header.family(self._metadata))
        adapter = CanonicalAdapter(
            modules,
            tokens,
            (self._terms.trigger,) if self._terms.trigger else header.triggers(self._metadata),
            header.kept(self._metadata),
            family or self._base.family,
        )
        low_rank = adapter.low_rank.values()
        # Tokens are bundled with files of every layout.
        tokens_read = self._layouts.pop(_TOKENS, 0)
        layout, votes = self._layouts.most_common(1)[0] if self._layouts else (_TOKENS, 0)
        report = AdapterReport(
            format=layout,
            confidence=(votes + tokens_read) / len(self._keys),
            software=header.software(self._metadata),
            family=family,
            evidence=evidence,
            base_family=self._base.family,
            matched=tuple(modules),
            unmatched=_listed(self._unmatched),
            coverage=_coverage(len(modules) + len(tokens), len(self._unmatched)),
            kinds=counted(kinds),
            ranks=counted(module.rank for module in low_rank),
            alphas=counted(module.alpha for module in low_rank),
            tokens=tokens_of(adapter),
            triggers=adapter.triggers,
            metadata=tuple(adapter.source.items()),
            norms=norms(adapter),
        )
        self._accept(report)
        return adapter, report

    def _convert(self) -> tuple[dict[str, Module], list[str]]:
        """The changes by real name, in the order of names, and the kind of each."""
        modules: dict[str, Module] = {}
        kinds: list[str] = []
        for name in sorted(self._layers):
            layer = self._layers[name]
            try:
                module = self._change(name, layer)
            except AdapterMismatch as error:
                self._unmatched[layer.label] = error.message
                continue
            for _, tensor in tensors_of(module):
                if not finite(tensor):
                    raise AdapterMismatch(
                        f"the adapter has values in {name} that are not finite", {"module": name}
                    )
            modules[name] = module
            kinds.append(_kind(layer.parts))
        return modules, kinds

    def _change(self, name: str, layer: _Layer) -> Module:
        parts, config, scale = layer.parts, layer.config, None
        if config is not None and "alpha" not in parts:
            rank = parts["lora_down.weight"].shape[0] if "lora_down.weight" in parts else 0
            alpha = config.alpha_of(name.partition(".")[2], rank)
            if alpha is not None and config.peft_type == "LORA":
                parts = {**parts, "alpha": torch.tensor(alpha, dtype=torch.float64)}
            elif alpha is not None and config.rank:
                scale = alpha / config.rank
        shape, max_rank = self._base.shapes[name], self._base.max_rank
        for part in ("diff", "w_norm"):
            if part in parts and not same_shape(parts[part].shape, shape):
                raise AdapterMismatch(f"has a {part} of shape {tuple(parts[part].shape)}; {shape} would fit")
        module = convert(name, parts, shape, max_rank=max_rank, scale=scale)
        if fault := shape_fault(module, shape, max_rank):
            raise AdapterMismatch(fault)
        return shaped(module, shape)

    def _named_tokens(self) -> dict[str, dict[str, Tensor]]:
        tokens: dict[str, dict[str, Tensor]] = {}
        for token in self._tokens:
            fit = fitted(token, self._base.widths)
            if isinstance(fit, str):
                self._unmatched[token.key] = fit
                continue
            encoder, vectors = fit
            if not finite(vectors):
                raise AdapterMismatch(f"{token.key} has values that are not finite", {"key": token.key})
            placeholder = self._placeholder(token)
            if encoder in tokens.setdefault(placeholder, {}):
                raise UnsupportedFormat(f"{token.key} repeats the token {placeholder!r} of {encoder}")
            tokens[placeholder][encoder] = vectors
        if self._terms.placeholder and len(tokens) > 1:
            raise UnsupportedFormat(f"the file has {len(tokens)} learned tokens: they keep their own names")
        return tokens

    def _placeholder(self, token: LearnedToken) -> str:
        named = token.placeholder or self._metadata.get("name", "").strip()
        placeholder = self._terms.placeholder or named or self._name
        if self._base.is_word(placeholder):
            raise AdapterMismatch(
                f"the learned token {placeholder!r} is a word of the base model's vocabulary: every prompt "
                f"with it would change; import it under another placeholder, say '<{placeholder}>'",
                {"placeholder": placeholder},
            )
        return placeholder

    def _accept(self, report: AdapterReport) -> None:
        """Raises AdapterMismatch for a file of which too little fits."""
        if report.coverage >= (0.0 if self._terms.allow_partial else self._terms.min_coverage) and (
            report.matched or report.tokens
        ):
            return
        first = report.unmatched[0]
        found = len(report.matched) + len(report.tokens)
        total = found + len(self._unmatched)
        told = f" The file is of {report.family} ({report.evidence})" if report.family else ""
        told += f", the base model of {report.base_family}." if told else ""
        hint = " allow_partial takes what fits." if found else ""
        raise AdapterMismatch(
            f"{len(self._unmatched)} of {total} parts of this {report.format} file do not fit the base: "
            f"{first.name}: {first.reason}.{told}{hint}",
            {
                "module": first.name,
                "matched": str(found),
                "unmatched": str(len(self._unmatched)),
                "coverage": f"{report.coverage:.3f}",
                "format": report.format,
                "family": report.family,
                "base_family": report.base_family,
            },
        )


def _listed(unmatched: Mapping[str, str]) -> tuple[UnmatchedPart, ...]:
    """What a report can hold of it: a stranger's file may have any number of names, of any length."""
    first = islice(unmatched.items(), _MOST_LISTED)
    listed = [UnmatchedPart(name[:_MOST_CHARACTERS], why) for name, why in first]
    if (more := len(unmatched) - len(listed)) > 0:
        listed.append(UnmatchedPart("...", f"and {more} more"))
    return tuple(listed)


def _check_dtype(key: str, tensor: Tensor, integers: bool) -> None:
    if tensor.dtype not in _FLOATS and not (integers and tensor.dtype in _INTEGERS):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UnsupportedFormat(f"{key} holds {kind}; floats of 16 bits or more are read", {"key": key})


def _coverage(matched: int, unmatched: int) -> float:
    return matched / (matched + unmatched) if matched + unmatched else 0.0


def _kind(parts: Mapping[str, Tensor]) -> str:
    """What a user calls it."""
    if not parts.keys().isdisjoint(("dora_scale", "magnitude")):
        return "dora"
    starts = {"hada": "loha", "lokr": "lokr", "w_norm": "norm", "b_norm": "norm", "diff": "full"}
    for start, kind in starts.items():
        if any(part.startswith(start) for part in parts) and "lora_down.weight" not in parts:
            return kind
    down = parts.get("lora_down.weight")
    convolution = (
        down is not None and down.dim() == 4 and (down.shape[2:] != (1, 1) or "lora_mid.weight" in parts)
    )
    return "locon" if convolution else "lora"
