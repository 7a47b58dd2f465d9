"""Merging, extracting and comparing adapters, against plain matrices."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from atelier_server.adapters.algebra import Pair, dot, nearest, weight_change, whole
from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule
from atelier_server.adapters.compare import compare
from atelier_server.adapters.extract import extract
from atelier_server.adapters.merge import Ingredient, Merged, merge
from atelier_server.errors import AdapterMismatch, InvalidRequest
from tests.unit.adapters.merged import merged_weight
from tests.unit.adapters.test_bank_kinds import KINDS, adapter_of, module_of
from tests.unit.adapters.tiny import BATCH, EVERYTHING, Inputs, adapter_for, tiny_unet, wrapped_unet

WEIGHTS = (0.7, -0.5, 1.2)


def ingredients(*adapters: CanonicalAdapter) -> list[Ingredient]:
    return [
        Ingredient(f"a{n}", adapter, weight)
        for n, (adapter, weight) in enumerate(zip(adapters, WEIGHTS, strict=False), start=1)
    ]


@pytest.fixture
def wrapped() -> tuple[UNet2DConditionModel, SlotBank]:
    return wrapped_unet(slots=4, max_rank=64)


def merged(bank: SlotBank, parts: list[Ingredient], rank: int | None = None, limit: int = 64) -> Merged:
    return merge(parts, bank.layer, rank=rank, max_rank=limit)


def pictures(unet: UNet2DConditionModel, bank: SlotBank, parts: list[Ingredient], result: Merged) -> float:
    """How far the merge's rows are from the composition's, relatively."""
    inputs = Inputs()
    for slot, part in enumerate(parts, start=1):
        bank.load(slot, part.adapter)
    with bank.use(bank.gather([[(slot, p.weight) for slot, p in enumerate(parts, start=1)]] * BATCH)):
        composed = inputs.run(unet)
    bank.check(result.adapter)
    bank.load(4, result.adapter)
    with bank.use(bank.gather([[(4, 1.0)]] * BATCH)):
        ours = inputs.run(unet)
    assert (composed - inputs.run(tiny_unet())).norm() > 1e-2 * composed.norm()
    return float((ours - composed).norm() / composed.norm())


Wrapped = tuple[UNet2DConditionModel, SlotBank]


@pytest.mark.parametrize("rank", [None, 40, 28])
def test_a_merge_is_the_composition(wrapped: Wrapped, rank: int | None) -> None:
    """Side by side, and by SVD at a rank below the sum and not below the change's own."""
    unet, bank = wrapped
    one = adapter_for(bank, rank=16, alpha=4, seed=1, targets=EVERYTHING)
    two = adapter_for(bank, rank=8, alpha=16, seed=2)
    again = CanonicalAdapter(  # a third whose change lies in the same directions as the first's
        {name: LoraModule(m.A, m.B * 2, m.alpha) for name, m in one.low_rank.items()}
    )
    parts = ingredients(one, two, again)
    result = merged(bank, parts, rank)
    assert pictures(unet, bank, parts, result) < 1e-5
    assert result.kept == pytest.approx(1.0)
    expected = 40 if rank in (None, 40) else 24
    assert max(module.rank for module in result.adapter.low_rank.values()) == expected
    assert result.adapter.source == {"merged_from": "a1:0.7, a2:-0.5, a3:1.2"}


@pytest.mark.parametrize(
    "kinds", [("lora", "full"), ("dora", "lora", "norms"), ("everything", "dora-inputs")]
)
def test_with_a_rank_every_kind_can_be_merged(wrapped: Wrapped, kinds: tuple[str, ...]) -> None:
    unet, bank = wrapped
    parts = ingredients(*(adapter_of(bank, kind) for kind in kinds))
    result = merged(bank, parts, 64)
    assert pictures(unet, bank, parts, result) < 1e-5  # no layer of the tiny U-Net has a larger rank
    assert not any(m.magnitude is not None for m in result.adapter.modules.values())
    small = merged(bank, parts, 2)
    assert 0.05 < small.kept < 0.99
    assert max(module.rank for module in small.adapter.low_rank.values()) == 2


def test_differences_and_norms_are_added_without_a_rank(wrapped: Wrapped) -> None:
    unet, bank = wrapped
    parts = ingredients(adapter_of(bank, "full"), adapter_of(bank, "full", seed=1), adapter_of(bank, "norms"))
    result = merged(bank, parts)
    assert not result.adapter.low_rank
    assert pictures(unet, bank, parts, result) < 1e-5


def test_one_adapter_alone_keeps_its_tensors_and_a_dora_its_magnitudes(wrapped: Wrapped) -> None:
    _, bank = wrapped
    lora, dora = adapter_of(bank, "lora"), adapter_of(bank, "dora")
    halved = merged(bank, [Ingredient("a", lora, 0.5)]).adapter.low_rank
    assert all(halved[name].A is module.A for name, module in lora.low_rank.items())
    assert all(halved[name].alpha == module.alpha / 2 for name, module in lora.low_rank.items())
    whole_dora = merged(bank, [Ingredient("a", dora, 1.0)]).adapter.low_rank
    assert all(module.magnitude is not None for module in whole_dora.values())


def test_kept_is_the_share_of_the_squared_norm(wrapped: Wrapped) -> None:
    _, bank = wrapped
    name = "unet.mid_block.attentions.0.proj_in"
    shape = bank.shapes[name]
    u, _ = torch.linalg.qr(torch.randn(shape[0], 3))
    module = LoraModule((u * torch.tensor([3.0, 2.0, 1.0])).T.reshape(3, *shape[1:]), u, 3.0)
    two = merged(bank, [Ingredient("a", CanonicalAdapter({name: module}), 2.0)], rank=2)
    assert two.kept == pytest.approx(13 / 14)


def test_tokens_triggers_and_families_go_along(wrapped: Wrapped) -> None:
    _, bank = wrapped
    vectors = {"text_encoder": torch.ones(2, 4)}
    one = CanonicalAdapter(adapter_of(bank, "lora").modules, {"<x>": vectors}, ("red", "cat"), family="sd1")
    two = CanonicalAdapter(adapter_of(bank, "lora", 2).modules, {"<y>": vectors}, ("cat", "hat"))
    result = merged(bank, ingredients(one, two)).adapter
    assert result.tokens.keys() == {"<x>", "<y>"}
    assert (result.triggers, result.family) == (("red", "cat", "hat"), "sd1")
    with pytest.raises(AdapterMismatch, match="a1 and a2 both have a learned token '<x>'"):
        merged(bank, ingredients(one, one))
    with pytest.raises(AdapterMismatch, match="a1 is of sd1, a2 is of sdxl"):
        merged(bank, ingredients(one, CanonicalAdapter(two.modules, family="sdxl")))


def test_sums_without_an_exact_form_ask_for_a_rank(wrapped: Wrapped) -> None:
    _, bank = wrapped
    lora, dora, full = (adapter_of(bank, kind) for kind in ("lora", "dora", "full"))
    cases = {
        "a2 is DoRA in unet": ingredients(lora, dora),
        "a1 is DoRA in unet": [Ingredient("a1", dora, 0.5)],
        "a1 is a full difference in unet.* exact sum with a LoRA": ingredients(full, lora),
    }
    for message, parts in cases.items():
        with pytest.raises(InvalidRequest, match=f"{message}.*give a rank"):
            merged(bank, parts)
    large = ingredients(*(adapter_for(bank, rank=20, alpha=1, seed=n) for n in range(3)))
    with pytest.raises(InvalidRequest, match=r"add up to 60, and this server takes 40.*give a rank"):
        merged(bank, large, limit=40)
    with pytest.raises(InvalidRequest, match="every weight is 0"):
        merged(bank, [Ingredient("a", lora, 0.0)])


# ------------------------------------------------------------------------------------------- the arithmetic
@pytest.mark.parametrize("kind", KINDS[:7])
@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3, 3)])
def test_a_change_is_the_merged_weight_less_the_base(kind: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    layer: nn.Module = nn.Linear(8, 12) if len(shape) == 2 else nn.Conv2d(8, 12, 3)
    module = module_of(kind, shape, generator)
    assert isinstance(layer.weight, Tensor)
    layer.requires_grad_(False)
    expected = (merged_weight(layer.weight, module) - layer.weight.double()).flatten(1)
    change = weight_change(module, layer)
    assert change is not None
    assert torch.allclose(whole(change).double(), expected, atol=1e-5)
    other = torch.randn(expected.shape, generator=generator)
    assert dot(change, other) == pytest.approx(float((expected * other).sum()), rel=1e-4)
    assert dot(change, change) == pytest.approx(float(expected.square().sum()), rel=1e-4)


@pytest.mark.parametrize("shape", [(200, 120), (90, 300), (30, 20)])
def test_the_nearest_pair_is_nearly_as_near_as_can_be(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(shape, generator=generator) @ torch.diag(0.97 ** torch.arange(shape[1]))
    values = torch.linalg.svdvals(matrix.double())
    pair, kept = nearest(matrix, 8)
    assert kept == pytest.approx(float(values[:8].square().sum()), rel=1e-4)
    assert float((matrix - whole(pair)).square().sum()) == pytest.approx(
        float(values[8:].square().sum()), rel=1e-3
    )
    again, _ = nearest(matrix, 8)
    assert torch.equal(pair.a, again.a)
    exact, _ = nearest(Pair(matrix[:, :9].double(), torch.eye(9, dtype=torch.float64)), 9)
    assert torch.allclose(whole(exact), matrix[:, :9], atol=1e-5)


# ------------------------------------------------------------------------------------------------ extraction
class Held(dict[str, Tensor]):
    """Weights by layer that are simply there."""

    @classmethod
    def of(cls, unet: nn.Module) -> Held:
        return cls({f"unet.{name}": m.weight for name, m in unet.named_modules() if hasattr(m, "weight")})


def shapes_of(bank: SlotBank) -> Mapping[str, tuple[int, ...]]:
    return {name: bank.shapes[name] for name in bank.layers}


def test_extracting_a_base_with_a_lora_merged_gives_the_loras_product(wrapped: Wrapped) -> None:
    unet, bank = wrapped
    lora = adapter_for(bank, rank=4, alpha=2, seed=1, targets=EVERYTHING)
    tuned = tiny_unet()
    for name, module in lora.low_rank.items():
        layer = tuned.get_submodule(name.removeprefix("unet."))
        layer.weight.data.copy_(merged_weight(layer.weight, module))
    told: list[tuple[int, int]] = []
    result = extract(
        Held.of(tuned),
        Held.of(tiny_unet()),
        shapes_of(bank),
        rank=16,
        family="sd1",
        progress=lambda done, all_: told.append((done, all_)),
    )
    assert result.adapter.modules.keys() == lora.modules.keys()
    for name, module in result.adapter.low_rank.items():
        assert module.rank <= 16
        product = whole(weight_change(lora.modules[name], nn.Identity()))  # type: ignore[arg-type]
        ours = whole(weight_change(module, nn.Identity()))  # type: ignore[arg-type]
        assert (ours - product).norm() < 1e-5 * product.norm()
    assert result.kept == pytest.approx(1.0)
    assert told == [(n, len(bank.layers)) for n in range(len(bank.layers) + 1)]
    inputs = Inputs()
    bank.load(1, result.adapter)
    with bank.use(bank.gather([[(1, 1.0)]] * BATCH)):
        ours = inputs.run(unet)
    expected = inputs.run(tuned)
    assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_one_layer_of_each_model_is_in_memory_at_a_time(wrapped: Wrapped) -> None:
    _, bank = wrapped
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Fresh(Held):
        def get(self, name: str) -> Tensor | None:  # type: ignore[override]
            nonlocal most
            weight = self[name].clone()
            alive.append(weakref.ref(weight))
            most = max(most, sum(ref() is not None for ref in alive))
            return weight

    tuned, base = Fresh(Held.of(tiny_unet(1))), Fresh(Held.of(tiny_unet()))
    extract(tuned, base, shapes_of(bank), rank=2, family="", progress=lambda *_: None)
    assert len(alive) == 2 * len(bank.layers)
    assert most <= 2


def test_a_rank_too_small_keeps_a_share(wrapped: Wrapped) -> None:
    _, bank = wrapped
    result = extract(
        Held.of(tiny_unet(1)),
        Held.of(tiny_unet()),
        shapes_of(bank),
        rank=2,
        family="",
        progress=lambda *_: None,
    )
    assert 0.01 < result.kept < 0.5
    assert {module.rank for module in result.adapter.low_rank.values()} == {2}


def test_bases_that_do_not_go_together_are_named(wrapped: Wrapped) -> None:
    _, bank = wrapped
    base = Held.of(tiny_unet())
    options = {"rank": 2, "family": "", "progress": lambda *_: None}
    with pytest.raises(InvalidRequest, match="nothing to extract"):
        extract(base, base, shapes_of(bank), **options)  # type: ignore[arg-type]
    other = Held(base)
    del other["unet.conv_in"]
    with pytest.raises(AdapterMismatch, match=r"tuned model has no layer unet\.conv_in"):
        extract(other, base, shapes_of(bank), **options)  # type: ignore[arg-type]
    other["unet.conv_in"] = torch.ones(3, 3)
    with pytest.raises(AdapterMismatch, match=r"unet\.conv_in of the base model has shape \(3, 3\)"):
        extract(base, other, shapes_of(bank), **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ comparison
def test_two_adapters_side_by_side(wrapped: Wrapped) -> None:
    _, bank = wrapped
    one = adapter_for(bank, rank=4, alpha=2, seed=1, targets=(".to_q", ".to_v"))
    doubled = {name: LoraModule(m.A, m.B, 2 * m.alpha) for name, m in one.low_rank.items()}
    name = next(iter(doubled))
    del doubled[name]
    norm = DenseModule(torch.ones(32))
    two = CanonicalAdapter({**doubled, "unet.conv_norm_out": norm})
    told = compare(one, two, bank.layer)
    assert (told.only_a, told.only_b) == ((name,), ("unet.conv_norm_out",))
    assert told.common == len(doubled)
    assert {(d.kind_a, d.rank_a, d.alpha_a, d.alpha_b) for d in told.differing} == {("lora", 4, 2.0, 4.0)}
    blocks = {block.block: block for block in told.blocks}
    assert blocks["unet"].norm_b == pytest.approx(32**0.5)
    assert blocks["unet"].cosine is None
    assert blocks["unet.mid_block"].cosine == pytest.approx(1.0)
    assert blocks["unet.mid_block"].norm_b == pytest.approx(2 * blocks["unet.mid_block"].norm_a)
    assert blocks["unet.mid_block"].norm_difference == pytest.approx(
        blocks["unet.mid_block"].norm_a, rel=1e-4
    )
    assert -1 <= (told.whole.cosine or 2) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_like_itself(wrapped: Wrapped, kind: str) -> None:
    _, bank = wrapped
    adapter = adapter_of(bank, kind)
    told = compare(adapter, adapter, bank.layer)
    assert (told.only_a, told.only_b, told.differing) == ((), (), ())
    assert told.whole.cosine == pytest.approx(1.0)
    assert told.whole.norm_difference < 1e-5 * told.whole.norm_a
