"""Modules that rest in one place and work in another, with two places on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from atelier_server.diffusion.base import load_base
from atelier_server.diffusion.offload import Offloaded


class Place:
    """Somewhere else: tensors brought here are copies, and counted."""

    def __init__(self) -> None:
        self.fetched: list[Tensor] = []
        self.settled = 0

    def fetch(self, tensor: Tensor) -> Tensor:
        self.fetched.append(tensor.clone())
        return self.fetched[-1]

    def settle(self) -> None:
        self.settled += 1

    def here(self, module: nn.Module) -> bool:
        mine = {tensor.data_ptr() for tensor in self.fetched}
        places = [tensor.data_ptr() in mine for tensor in (*module.parameters(), *module.buffers())]
        assert len(set(places)) == 1, "the module is in two places"
        return places[0]


def offloaded(module: nn.Module, place: Place, fetch: Callable[[Tensor], Tensor] | None = None) -> Offloaded:
    return Offloaded(module, fetch=fetch or place.fetch, settle=place.settle)


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False).eval()


def test_it_works_elsewhere_and_rests_where_it_was(module: nn.Module) -> None:
    place, x = Place(), torch.ones(2, 4)
    before, resting = module(x), [p.data_ptr() for p in module.parameters()]
    resting_place = offloaded(module, place)
    for _ in range(2):
        with resting_place.at_work():
            assert place.here(module)
            assert torch.equal(module(x), before)
        assert [p.data_ptr() for p in module.parameters()] == resting
    assert place.settled == 2


def test_a_use_inside_of_a_use_moves_nothing(module: nn.Module) -> None:
    place = Place()
    resting_place = offloaded(module, place)
    with resting_place.at_work():
        with resting_place.at_work():
            pass
        assert place.here(module)
    assert not place.here(module)
    assert len(place.fetched) == len([*module.parameters(), *module.buffers()])


def test_it_stays_until_the_last_thread_is_done(module: nn.Module) -> None:
    place = Place()
    resting_place = offloaded(module, place)
    inside, leave = threading.Event(), threading.Event()

    def use() -> None:
        with resting_place.at_work():
            inside.set()
            leave.wait(30)

    other = threading.Thread(target=use)
    other.start()
    assert inside.wait(30)
    with resting_place.at_work():
        pass
    assert place.here(module)
    leave.set()
    other.join()
    assert not place.here(module)


def test_it_goes_back_after_an_error(module: nn.Module) -> None:
    place = Place()
    with pytest.raises(ZeroDivisionError), offloaded(module, place).at_work():
        raise ZeroDivisionError
    assert not place.here(module)


def test_a_full_device_keeps_nothing(module: nn.Module) -> None:
    place = Place()

    def fetch(tensor: Tensor) -> Tensor:
        if len(place.fetched) == 2:
            raise torch.OutOfMemoryError
        return place.fetch(tensor)

    resting_place = offloaded(module, place, fetch)
    with pytest.raises(torch.OutOfMemoryError), resting_place.at_work():
        pass
    assert not place.here(module)


def test_a_base_fetches_what_it_uses() -> None:
    base = load_base("pocket", "cpu")
    plain_text, pixels = base.encode_prompt("a red cat"), torch.zeros(3, 64, 64)
    latents = base.encode_image(pixels)[0]
    picture = base.decode_latents(latents)
    places = {"text_encoder": Place(), "vae": Place()}
    base.offloaded = {name: offloaded(base.modules[name], place) for name, place in places.items()}
    assert torch.equal(base.encode_prompt("a red cat").states, plain_text.states)
    assert torch.equal(base.encode_caption("a red cat").states, plain_text.states)
    assert torch.equal(base.encode_image(pixels)[0], latents)
    assert torch.equal(base.decode_latents(latents), picture)
    assert (places["text_encoder"].settled, places["vae"].settled) == (2, 2)
    assert not any(place.here(base.modules[name]) for name, place in places.items())


def test_on_a_cpu_it_does_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    base = load_base("pocket", "cpu", offload=("text_encoders", "vae"))
    assert not base.offloaded
    assert "offload text_encoders, vae: no effect, the device is the CPU" in caplog.text
