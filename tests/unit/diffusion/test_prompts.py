"""Weights and windows: what is plain stays bit for bit, what is not is what one would do by hand."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.prompts import MAX_WEIGHT, Piece, parse
from tests.bases import FAMILIES, save_base

LONG = ", ".join(["a red octopus on a beach", "a yellow cat in the snow", "a green car"] * 6)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(str(save_base(request.param, tmp_path_factory.mktemp(request.param))), "cpu")


def said(prompt: str) -> list[tuple[str, float]]:
    return [(piece.text, round(piece.weight, 6)) for piece in parse(prompt)]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", [("", 1.0)]),
        ("a cat", [("a cat", 1.0)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("(a (red: 2) cat:.5)", [("a ", 0.5), ("red", 1.0), (" cat", 0.5)]),
        ("(a cat)", [("(a cat)", 1.0)]),
        ("(see (this:1.2))", [("(see ", 1.0), ("this", 1.2), (")", 1.0)]),
        (r"\(red:1.3\)", [("(red:1.3)", 1.0)]),
        (r"(\(red\):1.3)", [("(red)", 1.3)]),
        ("a clock (at 10:30)", [("a clock (at 10:30)", 1.0)]),
        ("(ratio 4:3 :0.5)", [("ratio 4:3 ", 0.5)]),
        ("(x:-1)(y:+2)", [("x", -1.0), ("y", 2.0)]),
        ("(:1.3)", [("", 1.0)]),
        (":1.3) (x", [(":1.3) (x", 1.0)]),
        ("(x:1.3", [("(x:1.3", 1.0)]),
    ],
)
def test_groups_are_read(prompt: str, pieces: list[tuple[str, float]]) -> None:
    assert said(prompt) == pieces


def obvious(prompt: str, weight: float = 1.0) -> list[tuple[str, float]]:
    """The innermost group first, again and again: characters with their weights."""
    chars: list[tuple[str, float]] = [(char, weight) for char in prompt]
    hidden = {"(": "\1", ")": "\2"}
    while match := re.search(r"\(([^()]*)\)", "".join(char for char, _ in chars)):
        begin, end = match.span()
        told = re.fullmatch(r"(.*?):\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*", match[1], re.S)
        inside = chars[begin + 1 : end - 1]
        if told and abs(float(told[2])) <= MAX_WEIGHT:
            inside = [(char, w * float(told[2])) for char, w in inside[: match[1].rindex(":")]]
            chars[begin:end] = inside
        else:
            chars[begin:end] = [(hidden["("], chars[begin][1]), *inside, (hidden[")"], chars[end - 1][1])]
    return [({"\1": "(", "\2": ")"}.get(char, char), w) for char, w in chars]


@given(st.text(alphabet="ab():1.", max_size=24))
@example("(a:1)(b:.1:1)")
def test_any_prompt_reads_as_it_would_by_hand(prompt: str) -> None:
    try:
        pieces = parse(prompt)
    except ValueError:
        return
    expected = obvious(prompt)
    assert "".join(piece.text for piece in pieces) == "".join(char for char, _ in expected)
    weights = [piece.weight for piece in pieces for _ in piece.text]
    assert all(math.isclose(a, b) for a, (_, b) in zip(weights, expected, strict=True))


def test_deep_and_large_groups_are_no_trouble() -> None:
    assert parse("(" * 5000) == [Piece("(" * 5000)]
    assert parse("(" * 3000 + "x" + ":1)" * 3000) == [Piece("x")]
    with pytest.raises(ValueError, match="nested weights multiply to 16, more than 10"):
        parse("((x:4):4)")


def test_a_plain_prompt_keeps_its_bits(base: BaseModel) -> None:
    """Also one with parentheses, and beside weighted words."""
    for text in ("", "a red octopus on a beach", "a red (octopus) [on] a beach: 3)"):
        plain = base.encode_caption(text)
        heard = base.encode_prompt(text)
        assert torch.equal(heard.states, plain.states)
        assert heard.pooled is None or torch.equal(heard.pooled, plain.pooled)
    assert torch.equal(
        base.encode_prompt("a (red:1.0) octopus").states, base.encode_caption("a red octopus").states
    )


def test_a_weight_moves_its_tokens_away_from_the_empty_text(base: BaseModel) -> None:
    plain, empty = base.encode_caption("a red octopus").states, base.encode_caption("").states
    weighted = base.encode_prompt("a (red:1.3) octopus").states
    ids = base.encoders[0].ids("a"), base.encoders[0].ids("a red")
    begin, end = 1 + len(ids[0]), 1 + len(ids[1])
    moved = empty[begin:end] + (plain[begin:end] - empty[begin:end]) * 1.3
    assert torch.allclose(weighted[begin:end], moved, atol=1e-6)
    assert torch.equal(weighted[:begin], plain[:begin])
    assert torch.equal(weighted[end:], plain[end:])
    gone = base.encode_prompt("a (red:0) octopus").states
    assert torch.allclose(gone[begin:end], empty[begin:end], atol=1e-6)


def test_a_long_prompt_is_heard_in_windows_divided_between_words(base: BaseModel) -> None:
    states = base.encode_prompt(LONG).states
    encoder = base.encoders[0]
    count = len(states) // encoder.max_tokens
    assert count >= 2
    # By hand: the words that fit, then the rest.
    words = LONG.replace(",", " ,").split()
    first = max(
        n for n in range(len(words)) if len(encoder.ids(" ".join(words[:n]))) <= encoder.max_tokens - 2
    )
    assert torch.equal(states[: encoder.max_tokens], base.encode_caption(" ".join(words[:first])).states)
    second = base.encode_caption(" ".join(words[first:])).states
    assert torch.equal(states[encoder.max_tokens : 2 * encoder.max_tokens], second)


def test_a_prompt_without_end_is_refused(base: BaseModel) -> None:
    with pytest.raises(ValueError, match="at most 8 times are possible"):
        base.encode_prompt("octopus " * 700)
