"""Prompts as people write them: parts with weights, and more words than a text encoder hears at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atelier_server.diffusion.conditioning import TextEmbeds
from atelier_server.diffusion.families import Family
from atelier_server.diffusion.text import TextEncoder, WordIds

MAX_WINDOWS = 8
MAX_WEIGHT = 10.0
# ":1.3)" at the end of a group; a number above MAX_WEIGHT is none: "(at 10:30)" is a time.
_WEIGHT = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")
_LONGEST_WEIGHT = 16

Weighted = tuple[int, float]  # a token's id and its weight


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt, all of one weight."""

    text: str
    weight: float = 1.0


def parse(prompt: str) -> list[Piece]:
    r"""The parts of a prompt: "(word:1.3)" weighs what is inside, and inside another group both count.

    Everything else stays as it is, parentheses too; "\(" and "\)" are never a group's. ValueError where
    nested weights multiply to more than MAX_WEIGHT.
    """
    ends = _groups(prompt)
    pieces: list[Piece] = []
    weights = [1.0]
    closing: list[tuple[int, int]] = []  # of the groups around: where the text ends, where the group does
    text, position = "", 0
    while position < len(prompt):
        char = prompt[position]
        step = 1
        if position in ends or (closing and position == closing[-1][0]):
            if text:
                pieces.append(Piece(text, weights[-1]))
            text = ""
            if position in ends:
                colon, after, weight = ends[position]
                closing.append((colon, after))
                weights.append(weights[-1] * weight)
                if abs(weights[-1]) > MAX_WEIGHT:
                    raise ValueError(f"nested weights multiply to {weights[-1]:g}, more than {MAX_WEIGHT:g}")
            else:
                step = closing.pop()[1] - position
                weights.pop()
        elif char == "\\" and prompt[position + 1 : position + 2] in ("(", ")"):
            text += prompt[position + 1]
            step = 2
        else:
            text += char
        position += step
    if text or not pieces:
        pieces.append(Piece(text))
    return pieces


def _groups(prompt: str) -> dict[int, tuple[int, int, float]]:
    """Of each group its opening parenthesis: the place of its last colon, the end, the weight."""
    found: dict[int, tuple[int, int, float]] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\[()]|[()]", prompt):
        if match[0] == "(":
            opened.append(match.start())
        elif match[0] == ")" and opened:
            begin = opened.pop()
            colon = prompt.rfind(":", max(begin, match.start() - _LONGEST_WEIGHT), match.start())
            told = _WEIGHT.fullmatch(prompt, colon, match.end()) if colon > 0 else None
            if told and abs(float(told[1])) <= MAX_WEIGHT:
                found[begin] = (colon, match.end(), float(told[1]))
    return found


def encode(
    family: Family,
    encoders: Sequence[TextEncoder],
    prompt: str,
    clip_skip: int,
    words: Mapping[str, WordIds],
) -> TextEmbeds:
    """Hidden states [n * tokens, dim] of a prompt that takes n windows of the encoders, each heard alone.

    A weight moves a token's states away from those of an empty text, or towards them (below 1). ValueError
    for a prompt of more than MAX_WINDOWS, or weights that are too large.
    """
    pieces = parse(prompt)
    heard = [_windows(encoder, pieces, words.get(encoder.name)) for encoder in encoders]
    count = max(len(windows) for windows in heard)
    if count > MAX_WINDOWS:
        room = encoders[0].max_tokens - 2
        raise ValueError(f"it takes {count} times {room} tokens; at most {MAX_WINDOWS} times are possible")
    parts = [
        _window(family, encoders, [windows[i] if i < len(windows) else [] for windows in heard], clip_skip)
        for i in range(count)
    ]
    states = parts[0].states if count == 1 else torch.cat([part.states for part in parts])
    return TextEmbeds(states, parts[0].pooled)


def _window(
    family: Family, encoders: Sequence[TextEncoder], tokens: Sequence[Sequence[Weighted]], clip_skip: int
) -> TextEmbeds:
    """One window: each encoder's weighted tokens."""
    pairs = list(zip(encoders, tokens, strict=True))
    embeds = family.encode(
        encoders, [encoder.framed([token for token, _ in its]) for encoder, its in pairs], clip_skip
    )
    if all(weight == 1.0 for its in tokens for _, weight in its):
        return embeds
    empty = family.encode(encoders, [encoder.framed([]) for encoder in encoders], clip_skip)
    weights = torch.cat([_spread(encoder, its) for encoder, its in pairs], dim=-1).to(embeds.states)
    moved = empty.states + (embeds.states - empty.states) * weights
    return TextEmbeds(torch.where(weights == 1.0, embeds.states, moved), embeds.pooled)


def _spread(encoder: TextEncoder, tokens: Sequence[Weighted]) -> Tensor:
    """[max_tokens, dim]: a row a token, the frame's with 1."""
    weights = torch.ones(encoder.max_tokens)
    weights[1 : 1 + len(tokens)] = torch.tensor([weight for _, weight in tokens])
    return weights[:, None].expand(-1, encoder.model.config.hidden_size)


def _windows(encoder: TextEncoder, pieces: Sequence[Piece], words: WordIds | None) -> list[list[Weighted]]:
    """The tokens of a prompt, as many at once as the encoder hears, divided between words."""
    room = encoder.max_tokens - 2
    windows: list[list[Weighted]] = [[]]
    for piece in pieces:
        for word in _words(encoder, encoder.ids(piece.text, words)):
            if len(windows[-1]) + len(word) > room:
                windows.append([])
            for token in word:
                if len(windows[-1]) == room:  # a word longer than a window
                    windows.append([])
                windows[-1].append((token, piece.weight))
    return [window for window in windows if window] or [[]]


def _words(encoder: TextEncoder, ids: Sequence[int]) -> Iterator[list[int]]:
    """Tokens that belong together: a word's, which CLIP ends with </w>, and a learned word's."""
    known = len(encoder.tokenizer)
    word: list[int] = []
    for token in ids:
        learned = token >= known
        if word and learned != (word[-1] >= known):
            yield word
            word = []
        word.append(token)
        if not learned and encoder.tokenizer.convert_ids_to_tokens(token).endswith("</w>"):
            yield word
            word = []
    if word:
        yield word
