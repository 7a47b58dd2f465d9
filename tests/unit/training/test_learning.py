"""Optimizers, schedules, scaling and averages against plain loops of torch's and diffusers' own; resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from prodigyopt import Prodigy
from torch import Tensor, nn

from atelier_server.core import Recipe
from atelier_server.errors import InvalidRequest
from atelier_server.training.checkpoint import read_state, write_state
from atelier_server.training.learning import Learning
from atelier_server.training.optimizers import optimizers_on
from atelier_server.training.parts import Part

CPU = torch.device("cpu")
STEPS = 12


def recipe(**changes: Any) -> Recipe:
    return Recipe("otto", 64, **{"max_train_steps": STEPS, "learning_rate": 1e-2, **changes})


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    chance = torch.Generator().manual_seed(seed)
    return {
        "A": nn.Parameter(torch.randn(4, 3, generator=chance)),
        "B": nn.Parameter(torch.zeros(2, 4)),  # as LoRA's are: Prodigy keeps less of those
        "tokens": nn.Parameter(torch.randn(5, generator=chance)),
    }


def loss_of(own: dict[str, nn.Parameter], step: int) -> Tensor:
    chance = torch.Generator().manual_seed(step)
    x, y = torch.randn(3, generator=chance), torch.randn(2, generator=chance)
    return (own["B"] @ (own["A"] @ x) - y).square().mean() + own["tokens"].square().mean()


def parts_of(own: dict[str, nn.Parameter], rates: tuple[float, float]) -> list[Part]:
    return [
        Part("unet", {name: own[name] for name in ("A", "B")}, rates[0]),
        Part("tokens", {"tokens": own["tokens"]}, rates[1]),
    ]


def learned(
    learning: Learning, own: dict[str, nn.Parameter], steps: range, poison: frozenset[int] = frozenset()
) -> None:
    for step in steps:
        loss = loss_of(own, step) * (1.0 if learning.scale is None else learning.scale)
        gradients = list(torch.autograd.grad(loss, learning.parameters))
        if step in poison:
            gradients[0] = torch.full_like(gradients[0], float("inf"))
        if learning.add(gradients):
            assert learning.clip()
            learning.step()


Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[dict[str, Any], tuple[float, float], Make]] = {
    "adamw": (
        {"adam_weight_decay": 0.1, "adam_beta2": 0.95},
        (1e-2, 3e-2),
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    ),
    "prodigy": (
        {"learning_rate": 1.0},
        (1.0, 1.0),
        lambda groups: Prodigy(
            groups, weight_decay=0.01, decouple=True, use_bias_correction=True, safeguard_warmup=True
        ),
    ),
}
SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@pytest.mark.parametrize("lr_scheduler", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_plain_loop(optimizer: str, lr_scheduler: str) -> None:
    changes, rates, make = OPTIMIZERS[optimizer]
    own, peer = parameters(), parameters()
    knobs = recipe(
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        lr_warmup_steps=2,
        lr_num_cycles=2,
        lr_power=1.5,
        max_grad_norm=0.7,
        **changes,
    )
    learned(Learning(parts_of(own, rates), knobs, STEPS, device=CPU), own, range(STEPS))
    groups = [
        {"params": list(part.parameters.values()), "lr": part.learning_rate} for part in parts_of(peer, rates)
    ]
    plain = make(groups)
    schedule = get_scheduler(
        lr_scheduler, plain, num_warmup_steps=2, num_training_steps=STEPS, num_cycles=2, power=1.5
    )
    for step in range(STEPS):
        loss_of(peer, step).backward()
        nn.utils.clip_grad_norm_(peer.values(), 0.7)
        plain.step()
        schedule.step()
        plain.zero_grad()
    for name, parameter in own.items():
        assert torch.equal(parameter, peer[name])
        assert not torch.equal(parameter, parameters()[name])


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    own, peer = parameters(), parameters()
    rates = (1e-2, 1e-2)
    learning = Learning(parts_of(own, rates), recipe(gradient_accumulation_steps=3), 4, device=CPU)
    learned(learning, own, range(12))
    plain = Learning(parts_of(peer, rates), recipe(), 4, device=CPU)
    for step in range(4):
        loss = torch.stack([loss_of(peer, 3 * step + micro) for micro in range(3)]).mean()
        plain.add(torch.autograd.grad(loss, plain.parameters))
        plain.clip()
        plain.step()
    for name, parameter in own.items():
        assert torch.allclose(parameter, peer[name], atol=1e-6)


def test_the_average_is_what_its_formula_says() -> None:
    own = parameters()
    learning = Learning(parts_of(own, (1e-2, 1e-2)), recipe(use_ema=True, ema_decay=0.4), STEPS, device=CPU)
    shadow = {name: parameter.detach().clone() for name, parameter in own.items()}
    for step in range(STEPS):
        learned(learning, own, range(step, step + 1))
        decay = min(0.4, (1 + step) / (10 + step)) if step else 0.0
        for name, parameter in own.items():
            shadow[name] = decay * shadow[name] + (1 - decay) * parameter.detach()
    raw = {name: parameter.detach().clone() for name, parameter in own.items()}
    with learning.averaged():
        for name, parameter in own.items():
            assert torch.allclose(parameter, shadow[name], atol=1e-6)
            assert not torch.equal(parameter, raw[name])
    assert all(torch.equal(parameter, raw[name]) for name, parameter in own.items())


def test_a_scaled_step_is_the_same_step_and_one_that_overflows_only_moves_the_scale() -> None:
    """A power of two scales a gradient without a rounding."""
    own, peer = parameters(), parameters()
    scaled = Learning(parts_of(own, (1e-2, 1e-2)), recipe(), STEPS, device=CPU, scaled=True)
    assert scaled.scale == 2.0**16
    learned(scaled, own, range(2))
    rate = scaled.rate
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    learned(scaled, own, range(2, 3), frozenset({2}))
    assert scaled.scale == 2.0**15
    assert scaled.rate == rate
    assert all(torch.equal(parameter, before[name]) for name, parameter in own.items())
    learned(scaled, own, range(3, 5))
    plain = Learning(parts_of(peer, (1e-2, 1e-2)), recipe(), STEPS, device=CPU)
    for steps in (range(2), range(3, 5)):
        learned(plain, peer, steps)
    assert all(torch.equal(parameter, peer[name]) for name, parameter in own.items())


def test_gradients_that_no_scale_helps_are_told() -> None:
    own = parameters()
    learning = Learning(parts_of(own, (1e-2, 1e-2)), recipe(), STEPS, device=CPU, scaled=True)
    fits = []
    for _ in range(40):
        assert learning.scale is not None
        learning.add([torch.full_like(p, float("nan")) for p in learning.parameters])
        fits.append(learning.clip())
        if not fits[-1]:
            break
        learning.step()
    assert fits[-1] is False
    assert 20 < len(fits) < 40


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_ema": True, "ema_decay": 0.7},
        {"optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"gradient_accumulation_steps": 3, "use_ema": True, "lr_scheduler": "polynomial"},
    ],
    ids=["adamw", "ema", "prodigy", "accumulating"],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_it_goes_on_to_the_same_bits(changes: dict[str, Any], scaled: bool, tmp_path: Path) -> None:
    """Through the files of a checkpoint, in the midst of a step's micro-steps too."""
    knobs = recipe(**changes)
    rates = (knobs.learning_rate, knobs.learning_rate)
    own, other = parameters(), parameters(1)
    straight = Learning(parts_of(own, rates), knobs, STEPS, device=CPU, scaled=scaled)
    poison = frozenset({3}) if scaled else frozenset[int]()
    learned(straight, own, range(7), poison)
    write_state({"learning": straight.state_dict()}, tmp_path)
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(own[name])
    resumed = Learning(parts_of(other, rates), knobs, STEPS, device=CPU, scaled=scaled)
    resumed.load_state_dict(read_state(tmp_path)["learning"])
    assert json.loads((tmp_path / "training-state.json").read_text())
    for learning, mine in ((straight, own), (resumed, other)):
        learned(learning, mine, range(7, 14))
    assert straight.rate == resumed.rate
    for name, parameter in own.items():
        assert torch.equal(parameter, other[name])
    with straight.averaged(), resumed.averaged():
        assert all(torch.equal(parameter, other[name]) for name, parameter in own.items())


def test_prodigy_takes_one_rate_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    own = parameters()
    Learning(parts_of(own, (1.0, 1.0)), recipe(optimizer="prodigy"), STEPS, device=CPU)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InvalidRequest, match=r"unet 1, tokens 0.5") as caught:
        Learning(parts_of(own, (1.0, 0.5)), recipe(optimizer="prodigy"), STEPS, device=CPU)
    assert caught.value.violations[0].field == "recipe.optimizer"


def test_8_bit_adamw_is_refused_where_it_is_not() -> None:
    assert optimizers_on(CPU) == ("adamw", "prodigy")
    with pytest.raises(InvalidRequest, match="CUDA GPU and bitsandbytes") as caught:
        Learning(parts_of(parameters(), (1.0, 1.0)), recipe(optimizer="adamw8bit"), STEPS, device=CPU)
    assert caught.value.violations[0].field == "recipe.optimizer"


def test_a_schedule_that_cannot_be_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"recipe\.lr_scheduler"):
        Learning(parts_of(parameters(), (1e-9, 1e-9)), recipe(lr_scheduler="polynomial"), STEPS, device=CPU)


def test_a_polynomial_schedule_may_be_shorter_than_its_warm_up() -> None:
    """As the first phase of `pivotal` may be: diffusers' schedule would divide by zero."""
    own = parameters()
    asked = recipe(lr_scheduler="polynomial", lr_warmup_steps=8)
    learning = Learning(parts_of(own, (1e-2, 1e-2)), asked, 4, device=CPU)
    learned(learning, own, range(4))
    assert 0.0 <= learning.rate < 1e-2
