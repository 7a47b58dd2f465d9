"""The slot bank on a GPU: rows with different adapters are those of merged weights, and keep their bits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from atelier_server import pocket
from atelier_server.adapters.bank import SlotBank
from atelier_server.core import AdapterUse, Mode
from benchmarks.desk import Desk, job
from tests.adapters import random_adapter, write
from tests.bases import FAMILIES, pipeline_of
from tests.gpu.device import DEVICE
from tests.unit.adapters.merged import merge
from tests.unit.adapters.tiny import EVERYTHING, adapter_for

pytestmark = pytest.mark.gpu
RANKS = (1, 4, 8, 16, 16)
Row = list[tuple[int, float]]
# One without, every adapter, one half as strong and backwards, a composition.
ROWS: list[Row] = [[], *([(slot, 1.0)] for slot in range(1, 6)), [(3, -0.5)], [(1, 0.5), (5, 0.8)]]


class Studio:
    """A U-Net, plain and in a bank with an adapter of each rank."""

    def __init__(self, name: str) -> None:
        unet: Any = (
            UNet2DConditionModel.from_pretrained(pocket.path(), subfolder="unet", dtype=torch.float32)
            if name == "pocket"
            else pipeline_of(name).unet
        )
        self.plain = unet.eval().requires_grad_(False).to(DEVICE)
        self.wrapped = copy.deepcopy(self.plain)
        self.bank = SlotBank(slots=len(RANKS), max_rank=16)
        self.bank.wrap(self.wrapped, "unet")
        self.load(EVERYTHING)
        generator = torch.Generator().manual_seed(1)
        config = unet.config

        def noise(*shape: int) -> Tensor:
            return torch.randn(len(ROWS), *shape, generator=generator).to(DEVICE)

        extended = config.addition_embed_type == "text_time"
        added = {"text_embeds": noise(40), "time_ids": noise(6)} if extended else {}
        self.inputs: dict[str, Any] = {
            "sample": noise(4, 8, 8),
            "timestep": torch.linspace(900, 100, len(ROWS), device=DEVICE),
            "encoder_hidden_states": noise(32, config.cross_attention_dim),
            "added_cond_kwargs": added,
        }

    def load(self, targets: Sequence[str]) -> None:
        """Adapters of these layers, of each rank."""
        self.adapters = [
            adapter_for(self.bank, rank=rank, alpha=rank / 2, seed=seed, targets=targets, size=0.05)
            for seed, rank in enumerate(RANKS)
        ]
        for slot, adapter in enumerate(self.adapters, start=1):
            self.bank.load(slot, adapter)

    @torch.no_grad()
    def forward(self, rows: list[Row], order: list[int] | None = None) -> Tensor:
        """With these rows' adapters; `order`: which row's inputs each row has."""
        with self.bank.use(self.bank.gather(rows)):
            return self.wrapped(**self._ordered(order), return_dict=False)[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self, row: Row) -> Tensor:
        """All rows' inputs on weights into which one row's adapters are merged."""
        unet = copy.deepcopy(self.plain).cpu()
        for name in self.adapters[0].modules:
            parts = [(self.adapters[slot - 1].modules[name], weight) for slot, weight in row]
            if parts:
                merge(unet.get_submodule(name.removeprefix("unet.")), parts)
        return unet.to(DEVICE)(**self.inputs, return_dict=False)[0]  # type: ignore[no-any-return]

    def _ordered(self, order: list[int] | None) -> dict[str, Any]:
        if order is None:
            return self.inputs
        picked = {key: value[order] for key, value in self.inputs.items() if isinstance(value, Tensor)}
        added = {key: value[order] for key, value in self.inputs["added_cond_kwargs"].items()}
        return {**picked, "added_cond_kwargs": added}


@pytest.fixture(scope="module", params=["pocket", *FAMILIES])
def studio(request: pytest.FixtureRequest) -> Studio:
    return Studio(request.param)


def test_rows_are_those_of_merged_weights(studio: Studio) -> None:
    mixed, plain = studio.forward(ROWS), studio.merged([])
    for number, row in enumerate(ROWS):
        expected = studio.merged(row)[number]
        assert (mixed[number] - expected).norm() / expected.norm() < 1e-4
        if row:
            assert (plain[number] - expected).norm() / expected.norm() > 1e-3


def test_a_row_has_the_bits_that_it_has_beside_rows_without_adapters(studio: Studio) -> None:
    off = {target: _alone(studio, target) for target in EVERYTHING}
    assert not any(off.values()), f"off by: {off}"


def _alone(studio: Studio, target: str) -> float:
    """The most that any row with adapters of these layers is off when its neighbours have none."""
    studio.load([target])
    mixed, off = studio.forward(ROWS), 0.0
    for number, row in enumerate(ROWS):
        alone = studio.forward([row if other == number else [] for other in range(len(ROWS))])
        off = max(off, (alone[number] - mixed[number]).abs().max().item())
    studio.load(EVERYTHING)
    return off


def test_a_row_has_its_bits_at_any_place(studio: Studio) -> None:
    mixed, off = studio.forward(ROWS), []
    for turn in range(1, len(ROWS)):
        order = [(place + turn) % len(ROWS) for place in range(len(ROWS))]
        turned = studio.forward([ROWS[number] for number in order], order)
        off.append((turned - mixed[order]).abs().max().item())
    assert off == [0.0] * len(off), f"by turn: {off}; largest value {mixed.abs().max().item()}"


def test_a_nan_stays_in_its_row(studio: Studio) -> None:
    spoiled = adapter_for(studio.bank, rank=4, alpha=4, seed=9, targets=EVERYTHING)
    next(iter(spoiled.low_rank.values())).A[0, 0] = torch.nan
    clean = studio.forward(ROWS)
    studio.bank.load(3, spoiled)
    dirty = studio.forward(ROWS)
    studio.bank.load(3, studio.adapters[2])
    uses = [any(slot == 3 for slot, _ in row) for row in ROWS]
    for number, used in enumerate(uses):
        assert bool(dirty[number].isfinite().all()) is not used
        assert used or torch.equal(dirty[number], clean[number])


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, list[AdapterUse]]:
    root = tmp_path_factory.mktemp("desk")
    served = Desk("pocket", root / "data", slots=4, max_rank=16, device=DEVICE, dtype="float32")
    files = [
        write(random_adapter(i, rank=rank, alpha=rank / 2), root / f"a{i}.safetensors")
        for i, rank in enumerate((2, 8, 16))
    ]
    return served, served.publish(files)


def test_strict_pictures_are_those_made_alone(desk: tuple[Desk, list[AdapterUse]]) -> None:
    served, uses = desk
    composed = (replace(uses[0], weight=0.6), replace(uses[2], weight=0.5))
    jobs = [
        replace(
            job(f"r{number}", "a red octopus", *adapters, steps=4, seed=number),
            scheduler=scheduler,
            mode=Mode.STRICT,
            bucket=8,
        )
        for number, (adapters, scheduler) in enumerate(
            [((uses[0],), "ddim"), ((uses[1],), "euler"), (composed, "dpmpp-2m"), ((), "euler-a")]
        )
    ]
    together = served.generate(jobs)
    differing = [one.id for one in jobs if served.generate([one])[one.id] != together[one.id]]
    assert not differing


def test_fast_pictures_differ_by_adapter(desk: tuple[Desk, list[AdapterUse]]) -> None:
    served, uses = desk
    jobs = [job(f"r{i}", "a red octopus", use, steps=4, seed=1) for i, use in enumerate(uses)]
    pictures = served.generate(jobs)
    assert len({pictures[one.id][0] for one in jobs}) == len(jobs)
