"""Adapter files in the worker: read from the store, imported into it, exported from it. No device work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.exporter import Layout, write_adapter
from atelier_server.adapters.host import pinned
from atelier_server.adapters.importer import Base, import_file
from atelier_server.adapters.records import REPORT_FILE
from atelier_server.adapters.report import difference_bytes
from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore
from atelier_server.adapters.stored import decode_stored, write_stored
from atelier_server.core import AdapterUse, CheckpointId
from atelier_server.diffusion.base import BaseModel
from atelier_server.errors import DataLoss, UnsupportedFormat
from atelier_server.report import AdapterReport, ImportTerms, PublishAs


class AdapterFiles:
    """The adapters of `store` for one base and its bank."""

    def __init__(self, base: BaseModel, bank: SlotBank, store: AdapterStore) -> None:
        self._base = base
        self._bank = bank
        self._store = store
        self._fit = Base.of(
            base.family.name,
            {name: module for name, module in base.modules.items() if name in ("unet", *_encoders(base))},
            max_rank=bank.max_rank,
            is_word=lambda word: any(_is_word(encoder.tokenizer, word) for encoder in base.encoders),
        )

    def read(self, use: AdapterUse) -> CanonicalAdapter:
        """A checkpoint of the store, its checksum verified. Raises DataLoss, AdapterNotFound."""
        try:
            adapter = decode_stored(self._store.fetch(use).read_bytes())
        except (FileNotFoundError, UnsupportedFormat) as error:
            metadata = {"adapter": str(use.checkpoint)}
            raise DataLoss(f"{use.checkpoint}: the stored file is unreadable", metadata) from error
        return pinned(adapter) if self._base.device.type == "cuda" else adapter

    def take(
        self,
        path: Path,
        name: str,
        new_version: bool,
        terms: ImportTerms,
        measure: Callable[[CanonicalAdapter], float | None],
    ) -> tuple[CheckpointId, AdapterReport]:
        """Publishes a foreign file or folder as step 0 of a new version, with its report beside it.

        `measure` tells how far an adapter moves the U-Net, and refuses one that breaks it. Raises
        UnsupportedFormat, AdapterMismatch, AdapterExists, StorageFull.
        """
        adapter, report = import_file(path, self._fit, terms, name.rpartition("/")[2])
        self._bank.check(adapter)
        report = replace(
            report,
            probe=measure(adapter),
            difference_bytes=difference_bytes(adapter, self._base.dtype.itemsize),
        )

        return self.publish(adapter, PublishAs(name, new_version, terms.trigger), report), report

    def publish(
        self, adapter: CanonicalAdapter, target: PublishAs, report: AdapterReport | None = None
    ) -> CheckpointId:
        """Step 0 of a new version, for this base. Raises AdapterExists, StorageFull."""

        def write(folder: Path) -> None:
            write_stored(adapter, folder / ADAPTER_FILE)
            if report is not None:
                (folder / REPORT_FILE).write_text(json.dumps(asdict(report), ensure_ascii=False))

        largest = adapter.largest
        record = self._store.publish_version(
            write,
            name=target.name,
            trigger=target.trigger or ", ".join(adapter.triggers),
            base_model=self._base.reference,
            base_sha256=self._base.sha256,
            family=self._base.family.name,
            new_version=target.new_version,
            rank=largest.rank if largest else 0,
            lora_alpha=largest.alpha if largest else 0.0,
        )
        return record.id

    def export(self, use: AdapterUse, layout: str, path: Path) -> tuple[int, str]:
        """Writes a checkpoint in `layout`, with recipe and trigger words: its size in bytes and digest."""
        adapter = self.read(use)
        meta = self._store.version(use.checkpoint.name, use.checkpoint.version).meta
        named = replace(
            adapter,
            triggers=adapter.triggers or ((meta.trigger,) if meta.trigger else ()),
            family=adapter.family or self._base.family.name,
        )
        title = use.checkpoint.name.rpartition("/")[2]
        header = {"modelspec.title": title, "atelier.step": str(use.checkpoint.step)}
        if meta.recipe:
            header["atelier.recipe"] = json.dumps(dict(meta.recipe), sort_keys=True)
        write_adapter(named, path, cast(Layout, layout), header, self._fit.names)
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _encoders(base: BaseModel) -> tuple[str, ...]:
    return tuple(encoder.name for encoder in base.encoders)


def _is_word(tokenizer: object, word: str) -> bool:
    """Whether a tokenizer of CLIP's kind has `word` as one entry: prompts with it have its embedding."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()  # type: ignore[attr-defined]
    return word in vocabulary or f"{word.lower().strip()}</w>" in vocabulary
