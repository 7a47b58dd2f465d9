"""Rows: which pictures, in which order, and what is drawn for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from atelier_server.core import Recipe
from atelier_server.diffusion.conditioning import Framing
from atelier_server.training.batch import Batch, Order, Orders
from atelier_server.training.dataset import CachedExample, Dataset, View
from atelier_server.training.pictures import Size


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recipe(**changes: object) -> Recipe:
    return Recipe("otto", 16, **{"train_batch_size": 2, **changes})  # type: ignore[arg-type]


def example(caption: str = "otto", size: Size = (16, 16), mean: float = 3.0) -> CachedExample:
    shape = (4, size[1] // 8, size[0] // 8)
    view = View(torch.full(shape, mean), torch.full(shape, 0.5), Framing.whole(*size))
    return CachedExample((view,), caption)


def examples(*sizes: Size) -> list[CachedExample]:
    return [example(str(number), size) for number, size in enumerate(sizes)]


def dataset(shown: Sequence[CachedExample]) -> Dataset:
    return Dataset(list(shown))


def test_every_epoch_has_every_picture_once() -> None:
    order, chance = Order([], 0), generator()
    taken = [index for _ in range(15) for index in order.take(4, 5, chance)]
    epochs = [taken[begin : begin + 5] for begin in range(0, 60, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_repeats_are_within_an_epoch() -> None:
    orders, chance = Orders(dataset(examples(*[(16, 16)] * 3)), recipe(repeats=4)), generator()
    taken = [e.caption for _ in range(12) for e in orders.take(chance)[0]]
    for begin in (0, 12):
        assert Counter(taken[begin : begin + 12]) == dict.fromkeys("012", 4)
    assert any(taken[at] == taken[at + 1] for at in range(11))  # shuffled among themselves


def test_a_batch_has_one_size_and_pictures_are_seen_equally_often() -> None:
    shown = examples(*[(16, 16)] * 5, *[(32, 8)] * 2, (8, 32))
    orders, chance = Orders(dataset(shown), recipe()), generator()
    seen: Counter[str] = Counter()
    for _ in range(400):
        rows, _ = orders.take(chance)
        assert len(rows) == 2
        assert len({row.size for row in rows}) == 1
        seen.update(row.caption for row in rows)
    assert seen == dict.fromkeys("01234567", 100)


def test_the_order_goes_on_where_it_was() -> None:
    shown = dataset(examples((16, 16), (16, 16), (32, 8), (32, 8), (32, 8)))
    shown.class_examples = {
        size: [example(f"class {n}", size) for n in range(3)] for size in ((16, 16), (32, 8))
    }
    straight, chance = Orders(shown, recipe()), generator()
    for _ in range(7):
        straight.take(chance)
    resumed = Orders(shown, recipe())
    resumed.load_state_dict(straight.state_dict())
    again = generator()
    again.set_state(chance.get_state())
    for _ in range(9):
        one, other = straight.take(chance), resumed.take(again)
        assert [row.caption for row in one[0]] == [row.caption for row in other[0]]


def test_as_many_of_the_class_follow() -> None:
    shown = dataset(examples(*[(16, 16)] * 3))
    shown.class_examples = {(16, 16): [example(f"class {n}") for n in range(5)]}
    orders, chance = Orders(shown, recipe()), generator()
    seen: Counter[str] = Counter()
    for _ in range(5):
        rows, instances = orders.take(chance)
        assert instances == 2
        assert [row.caption.startswith("class") for row in rows] == [False, False, True, True]
        seen.update(row.caption for row in rows[2:])
    assert seen == {f"class {n}": 2 for n in range(5)}


def test_the_posterior_is_sampled_anew_every_time() -> None:
    shown, chance = [example()] * 500, generator()

    def drawn() -> Batch:
        knobs = recipe(caption_dropout=0.25)
        return Batch.draw(shown, 400, knobs, num_train_timesteps=1000, generator=chance)

    batch = drawn()
    assert batch.latents.mean() == pytest.approx(3.0, abs=0.05)
    assert batch.latents.std() == pytest.approx(0.5, abs=0.05)
    assert batch.noise.std() == pytest.approx(1.0, abs=0.05)
    assert 0 <= int(batch.timesteps.min()) < 20
    assert 980 < int(batch.timesteps.max()) < 1000
    assert set(batch.captions) == {"otto", None}
    assert batch.captions.count(None) / 400 == pytest.approx(0.25, abs=0.06)
    assert None not in batch.captions[400:]  # those of the class are never dropped
    assert not torch.equal(batch.latents, drawn().latents)


def test_noise_offset_moves_whole_channels() -> None:
    def drawn(offset: float) -> Batch:
        knobs = recipe(noise_offset=offset)
        shown = [example()] * 200
        return Batch.draw(shown, 200, knobs, num_train_timesteps=1000, generator=generator())

    plain, moved = drawn(0.0), drawn(0.5)
    moves = moved.noise - plain.noise
    assert torch.allclose(moves, moves[..., :1, :1].expand_as(moves), atol=1e-5)
    assert moves[..., 0, 0].std() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(plain.latents, moved.latents)
