"""An adapter's text-encoder part and its learned tokens, against merged weights and diffusers' own loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.core import AdapterUse, CheckpointId
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.conditioning import TextEmbeds
from atelier_server.errors import AdapterMismatch
from atelier_server.workers.texts import Texts
from tests.bases import FAMILIES, peer, sampled, save_base

TEXT = "a red cat on a beach"
PROJECTIONS = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_base(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


class Resident:
    """A base with its bank, and adapters loaded into slots."""

    def __init__(self, folder: Path, adapters: Sequence[CanonicalAdapter] = ()) -> None:
        self.base: BaseModel = load_base(str(folder), "cpu")
        self.bank = SlotBank(slots=4, max_rank=32)
        for component in ("unet", *self.base.family.text_encoders):
            self.bank.wrap(self.base.modules[component], component)
        self.texts = Texts(self.base, self.bank)
        for slot, adapter in enumerate(adapters, 1):
            self.bank.load(slot, adapter)

    def hear(self, text: str, *weights: float) -> TextEmbeds:
        """With the adapters in slots 1, 2, ... at these weights."""
        return self.texts.prompt(text, [(use(slot, weight), slot) for slot, weight in enumerate(weights, 1)])


def use(number: int, weight: float) -> AdapterUse:
    return AdapterUse(CheckpointId(f"a{number}", 1, 0), weight, f"a{number}", f"sha{number}")


def adapter_for(
    bank: SlotBank, seed: int, *, rank: int, alpha: float, unet: bool = False
) -> CanonicalAdapter:
    """Large random changes of every projection of the text encoders, with alphas that differ."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for number, (name, layer) in enumerate(bank.layers.items()):
        if name.endswith(PROJECTIONS) or (unet and name.endswith(".to_q")):
            out, features = layer.weight.shape
            a = torch.randn(rank, features, generator=generator) / features**0.5
            b = torch.randn(out, rank, generator=generator) * 0.1
            modules[name] = LoraModule(a, b, alpha * (1 + number % 3))
    return CanonicalAdapter(modules)


def merged(pipeline: DiffusionPipeline, parts: Sequence[tuple[CanonicalAdapter, float]]) -> DiffusionPipeline:
    """The slow way: W + weight * alpha/r * B A in the weights of the text encoders."""
    for adapter, weight in parts:
        for name, module in adapter.low_rank.items():
            component, _, inner = name.partition(".")
            layer: nn.Module = getattr(pipeline, component).get_submodule(inner)
            layer.weight.data += weight * module.alpha / module.rank * module.B @ module.A
    return pipeline


@torch.no_grad()
def heard_by(family: str, pipeline: DiffusionPipeline, text: str) -> TextEmbeds:
    """diffusers' own encoding."""
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    encoded = pipeline.encode_prompt(text, **options)
    return TextEmbeds(encoded[0][0], encoded[2][0] if family == "sdxl" else None)


def error(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Relative to the largest value."""
    if ours is None or theirs is None:
        assert ours is theirs
        return 0.0
    return float((ours - theirs).abs().max() / theirs.abs().max())


def same(ours: TextEmbeds, theirs: TextEmbeds) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True))


@pytest.mark.parametrize("family", sampled("sd1", "sdxl"))
def test_text_parts_equal_merged_weights(family: str, folders: dict[str, Path]) -> None:
    plain = Resident(folders[family])
    adapters = [
        adapter_for(plain.bank, 1, rank=4, alpha=2.0),
        adapter_for(plain.bank, 2, rank=16, alpha=16.0, unet=True),
    ]
    resident = Resident(folders[family], adapters)
    base = resident.base.encode_prompt(TEXT)
    for weights in ((0.7,), (0.0, 1.0), (0.5, -1.0)):
        ours = resident.hear(TEXT, *weights)
        parts = [(adapter, w) for adapter, w in zip(adapters, weights, strict=False)]
        text_parts = [
            (CanonicalAdapter({n: m for n, m in a.low_rank.items() if not n.startswith("unet")}), w)
            for a, w in parts
        ]
        theirs = heard_by(family, merged(peer(family, folders[family]), text_parts), TEXT)
        assert error(ours.states, theirs.states) <= 1e-5
        assert error(ours.pooled, theirs.pooled) <= 1e-5
        assert error(ours.states, base.states) > 0.05
    assert same(resident.base.encode_prompt(TEXT), base)
    assert same(resident.hear(TEXT), plain.hear(TEXT))


def test_texts_are_kept_by_content_and_weight(folders: dict[str, Path]) -> None:
    plain = Resident(folders["sd1"])
    voiced = adapter_for(plain.bank, 1, rank=4, alpha=4.0)
    silent = CanonicalAdapter(
        {
            n: m
            for n, m in adapter_for(plain.bank, 3, rank=4, alpha=4.0, unet=True).low_rank.items()
            if n.startswith("unet")
        }
    )
    resident = Resident(folders["sd1"], [voiced, silent])
    calls: list[str] = []
    encode = resident.base.encode_prompt
    resident.base.encode_prompt = lambda text, **o: calls.append(text) or encode(text, **o)  # type: ignore[method-assign,func-returns-value]
    first = resident.hear(TEXT, 1.0)
    assert resident.hear(TEXT, 1.0, 0.5) is first  # the second does not change any text
    assert resident.texts.prompt(TEXT, [(use(1, 1.0), 1)]) is first
    assert not same(resident.hear(TEXT, 0.5), first)
    assert not same(resident.hear(TEXT), first)
    assert len(calls) == 3
    # Out, and in again in another slot: the same content, kept.
    resident.bank.clear(1)
    resident.bank.load(3, voiced)
    assert resident.texts.prompt(TEXT, [(use(1, 1.0), 3)]) is first
    resident.texts.negative("", [(use(1, 1.0), 3)])
    assert len(calls) == 4


# ------------------------------------------------------------------------------------------- learned tokens
def tokens(family: str, base: BaseModel, seed: int, **vectors: int) -> dict[str, dict[str, Tensor]]:
    """`<name>` of so many vectors, for every text encoder."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"<{name}>": {
            encoder.name: torch.randn(count, encoder.model.config.hidden_size, generator=generator)
            for encoder in base.encoders
        }
        for name, count in vectors.items()
    }


def taught(family: str, folder: Path, learned: dict[str, dict[str, Tensor]]) -> DiffusionPipeline:
    """diffusers' own loader on a copy of the base."""
    pipeline = peer(family, folder)
    for placeholder, encoders in learned.items():
        for encoder, vectors in encoders.items():
            pipeline.load_textual_inversion(
                {placeholder: vectors},
                token=placeholder,
                text_encoder=getattr(pipeline, encoder),
                tokenizer=getattr(pipeline, encoder.replace("text_encoder", "tokenizer")),
            )
    return pipeline


PROMPTS = (
    "a red cat",
    "<one> on a beach",
    "a <two> and a <one>, and <two> again",
    "photo of<two>,a car. <one>",
    "<two><two>",
    "x" * 30 + " fish" * 40 + " <one>",
    "fish " * 70 + "<two> car",
)


@pytest.mark.parametrize("family", sampled("sd2", "sdxl"))
def test_learned_tokens_equal_those_of_diffusers(family: str, folders: dict[str, Path]) -> None:
    plain = Resident(folders[family])
    learned = tokens(family, plain.base, 5, one=1, two=3)
    resident = Resident(folders[family], [CanonicalAdapter({}, learned)])
    pipeline = taught(family, folders[family], learned)
    for text in PROMPTS:
        assert same(resident.hear(text, 1.0), heard_by(family, pipeline, text)), text
    assert not same(resident.hear("<one>", 1.0), plain.hear("<one>"))


def test_one_placeholder_of_two_adapters(folders: dict[str, Path]) -> None:
    """In two requests it is two things; in one request nobody knows which."""
    base = Resident(folders["sdxl"]).base
    learned = [tokens("sdxl", base, seed, s=2) for seed in (1, 2)]
    resident = Resident(folders["sdxl"], [CanonicalAdapter({}, one) for one in learned])
    text = "a <s> on a beach"
    heard = [resident.texts.prompt(text, [(use(slot, 1.0), slot)]) for slot in (1, 2)]
    for one, ours in zip(learned, heard, strict=True):
        assert same(ours, heard_by("sdxl", taught("sdxl", folders["sdxl"], one), text))
    with pytest.raises(AdapterMismatch, match="two adapters of one picture both have the token <s>"):
        resident.hear(text, 1.0, 1.0)


def test_tokens_of_several_adapters_and_text_parts_go_together(folders: dict[str, Path]) -> None:
    plain = Resident(folders["sdxl"])
    voice = adapter_for(plain.bank, 1, rank=4, alpha=4.0)
    first, second = (tokens("sdxl", plain.base, seed, **{name: 2}) for seed, name in ((1, "a"), (2, "b")))
    resident = Resident(
        folders["sdxl"], [CanonicalAdapter(voice.modules, first), CanonicalAdapter({}, second)]
    )
    pipeline = taught("sdxl", folders["sdxl"], first | second)
    theirs = heard_by("sdxl", merged(pipeline, [(voice, 0.5)]), "<a> beside <b>")
    ours = resident.hear("<a> beside <b>", 0.5, 1.0)
    assert error(ours.states, theirs.states) <= 1e-5


def test_a_token_of_one_encoder_is_a_plain_word_for_the_other(folders: dict[str, Path]) -> None:
    plain = Resident(folders["sdxl"])
    learned = tokens("sdxl", plain.base, 3, s=1)
    only = {"<s>": {"text_encoder_2": learned["<s>"]["text_encoder_2"]}}
    ours = Resident(folders["sdxl"], [CanonicalAdapter({}, only)]).hear("a <s>", 1.0)
    width = plain.base.encoders[0].model.config.hidden_size
    assert torch.equal(ours.states[:, :width], plain.hear("a <s>").states[:, :width])
    assert not torch.equal(ours.states[:, width:], plain.hear("a <s>").states[:, width:])


@pytest.mark.parametrize(
    ("encoder", "shape", "message"),
    [
        ("text_encoder_2", (1, 32), "the token <s> is for text_encoder_2, which the base lacks"),
        ("text_encoder", (1, 40), r"the token <s> has vectors of shape \(1, 40\) .*\(n, 32\) would fit"),
        ("text_encoder", (0, 32), r"vectors of shape \(0, 32\)"),
    ],
)
def test_tokens_that_do_not_fit_are_named(
    folders: dict[str, Path], encoder: str, shape: tuple[int, int], message: str
) -> None:
    bank = Resident(folders["sd1"]).bank
    with pytest.raises(AdapterMismatch, match=message):
        bank.check(CanonicalAdapter({}, {"<s>": {encoder: torch.zeros(shape)}}))
    with pytest.raises(AdapterMismatch, match="not finite"):
        bank.check(CanonicalAdapter({}, {"<s>": {"text_encoder": torch.full((1, 32), float("nan"))}}))


def test_a_placeholder_inside_a_word_is_no_placeholder(folders: dict[str, Path]) -> None:
    encoder = Resident(folders["sd1"]).base.encoders[0]
    words = {"sks": range(9000, 9001), "sks-2": range(9001, 9002)}
    assert 9000 not in encoder.ids("asks sksa", words)
    assert encoder.ids("a sks-2, sks", words)[1:] == [9001, *encoder.ids(","), 9000]
