"""Learned tokens (textual inversion, arXiv 2208.01618): an adapter's own words, for the texts it goes with.

The tokenizer and its vocabulary stay as they are. The ids of a text's learned tokens follow the vocabulary,
in the order of its adapters, and mean something for that text alone: two requests may use one placeholder for
two things. They ascend, as those that diffusers' `load_textual_inversion` gives: text encoders whose config
says eos_token_id 2 take the largest id for the end of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from atelier_server.adapters.layers import Current
from atelier_server.errors import AdapterMismatch

Tokens = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """What one text may use: by text encoder the vectors [n, d], and the ids of each placeholder."""

    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    ids: Mapping[str, Mapping[str, range]] = field(default_factory=dict)


class BankEmbedding(nn.Embedding):
    """`base` with the learned tokens of the text that is being encoded after its own: shares its weights."""

    def __init__(self, base: nn.Embedding, component: str, current: Current) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, base.padding_idx, device="meta")
        self.weight = base.weight
        self.train(base.training)
        self.component = component
        self.current = current

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.current.words.get(self.component)
        if vectors is None:
            return super().forward(ids)
        learned = ids >= self.num_embeddings
        known = super().forward(ids.masked_fill(learned, 0))
        return torch.where(learned[..., None], vectors[(ids - self.num_embeddings).clamp(min=0)], known)


def is_vocabulary(module: nn.Module, name: str) -> bool:
    """Whether a module holds the vectors of a text encoder's words."""
    return type(module) is nn.Embedding and name.rpartition(".")[2] == "token_embedding"


def check_tokens(tokens: Tokens, vocabularies: Mapping[str, BankEmbedding]) -> None:
    """Raises AdapterMismatch for vectors that do not fit the base's text encoders."""
    for placeholder, encoders in tokens.items():
        for encoder, vectors in encoders.items():
            told = {"token": placeholder, "encoder": encoder}
            if (vocabulary := vocabularies.get(encoder)) is None:
                raise AdapterMismatch(f"the token {placeholder} is for {encoder}, which the base lacks", told)
            if vectors.dim() != 2 or not len(vectors) or vectors.shape[1] != vocabulary.embedding_dim:
                raise AdapterMismatch(
                    f"the token {placeholder} has vectors of shape {tuple(vectors.shape)} for {encoder}; "
                    f"(n, {vocabulary.embedding_dim}) would fit",
                    told,
                )


def resident(tokens: Tokens, vocabularies: Mapping[str, BankEmbedding]) -> dict[str, dict[str, Tensor]]:
    """The same tokens on the text encoders' device and of their dtype."""
    return {
        placeholder: {encoder: vectors.to(vocabularies[encoder].weight) for encoder, vectors in by.items()}
        for placeholder, by in tokens.items()
    }


def words_of(adapters: Sequence[Tokens], vocabularies: Mapping[str, BankEmbedding]) -> Words:
    """The words of these adapters together. Raises AdapterMismatch where two use one placeholder."""
    vectors: dict[str, list[Tensor]] = {}
    ids: dict[str, dict[str, range]] = {}
    seen: set[str] = set()
    for tokens in adapters:
        if twice := seen & tokens.keys():
            raise AdapterMismatch(
                f"two adapters of one picture both have the token {min(twice)}", {"token": min(twice)}
            )
        seen |= tokens.keys()
        for placeholder, encoders in tokens.items():
            for encoder, rows in encoders.items():
                held = vectors.setdefault(encoder, [])
                begin = vocabularies[encoder].num_embeddings + sum(map(len, held))
                held.append(rows)
                ids.setdefault(encoder, {})[placeholder] = range(begin, begin + len(rows))
    return Words({encoder: torch.cat(held) for encoder, held in vectors.items()}, ids)
