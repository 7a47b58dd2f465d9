"""The second part: a tokenizer, a CLIP text encoder and, against it, an image tower.

Contrastive training alone left the prototype blind to subjects, so both towers also answer questions about
what they see or read (`labels`). The gate is 90 % on pictures they have not seen. The same task makes the
scorer, whose text half is a copy of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from pocket.captions import Attributes, describe
from pocket.data import PictureSet
from pocket.labels import (
    Classes,
    build_heads,
    class_numbers,
    mistaken,
    named,
    question_loss,
    shares_right,
    shown_labels,
    told_labels,
)
from pocket.training import Batch, Losses, autocast, device
from pocket.vae import as_floats, as_tensor, moved

GATE = 0.9
_VOCABULARY = 2048
_START, _END = "<|startoftext|>", "<|endoftext|>"
# CLIP's words: contractions, letters, single digits, everything else.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(texts: Iterable[str], length: int = 32) -> CLIPTokenizer:
    """A byte-pair vocabulary in CLIP's layout: bytes, bytes that end a word, merges, start, end."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=_END))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    order = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet)])
    order |= dict.fromkeys(sorted(learnt["vocab"], key=learnt["vocab"].__getitem__))
    vocabulary = {token: number for number, token in enumerate([*order, _START, _END])}
    merges = [(left, right) for left, right in learnt["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str], padding: str = "max_length") -> Tensor:
    """Padded token ids: [n, tokens]. With padding "longest" there are no more tokens than the longest text
    has, which is enough for an embedding: CLIP reads it at the first end, and no token sees a later one."""
    length = tokenizer.model_max_length
    encoded = tokenizer(list(texts), padding=padding, truncation=True, max_length=length)
    return torch.tensor(encoded["input_ids"])


def load_text(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the text encoder of a pipeline's folder, in float32."""
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), text_encoder


def build_clip(
    tokenizer: CLIPTokenizer, *, like: CLIPTextModel | None = None, width: int = 128, layers: int = 3
) -> CLIPModel:
    """CLIP for 64 x 64 pixels, small: `layers` of text, one more of 8 x 8 patches.

    With `like`, the text half has that encoder's shape and begins at its weights.
    """
    if like is not None:
        width, layers = like.config.hidden_size, like.config.num_hidden_layers
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": layers,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": layers + 1, "image_size": 64, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=shape | text, vision_config=shape | vision, projection_dim=96))
    _begin_seeing(clip)
    if like is not None:
        clip.text_model.load_state_dict(like.state_dict())
    return clip


@torch.no_grad()
def _begin_seeing(clip: CLIPModel) -> None:
    """Begins the image tower's attention where trained ones are found: places know their neighbours, queries
    look for keys like them, values subtract what is there (mimetic initialisation, arXiv 2305.09828)."""
    tower = clip.vision_model
    width, heads = tower.config.hidden_size, tower.config.num_attention_heads
    places = tower.embeddings.position_embedding.weight
    side = math.isqrt(len(places) - 1)
    places[1:] = 0.1 * _waves(side, width)
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        for head in torch.arange(width).chunk(heads):
            u, s, v = torch.linalg.svd(_near_identity(width, 0.7, 0.7))
            root = s[: len(head)].sqrt()
            attention.q_proj.weight[head] = (u[:, : len(head)] * root).T
            attention.k_proj.weight[head] = v[: len(head)] * root[:, None]
        u, s, v = torch.linalg.svd(_near_identity(width, 0.4, -0.4))
        attention.out_proj.weight.copy_(u * s.sqrt())
        attention.v_proj.weight.copy_(s.sqrt()[:, None] * v)


def _near_identity(width: int, noise: float, identity: float) -> Tensor:
    return noise * torch.randn(width, width) / math.sqrt(width) + identity * torch.eye(width)


def _waves(side: int, width: int) -> Tensor:
    """Sines and cosines of a place's column and row: [side * side, width]."""
    frequencies = 100 ** -(torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


class Towers(nn.Module):
    """CLIP's two towers with questions asked of both: heads on the image's and the text's embedding."""

    def __init__(self, clip: CLIPModel, classes: Classes) -> None:
        super().__init__()
        self.clip, self.classes = clip, classes
        self.seen = build_heads(clip.config.projection_dim, classes)
        self.read = build_heads(clip.config.projection_dim, classes)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Pictures [b, 3, 64, 64] in -1..1 -> embeddings [b, d], not normalised."""
        embedded = self.clip.vision_model(pixel_values=pixels).pooler_output
        projected: Tensor = self.clip.visual_projection(embedded)
        return projected

    def embed_texts(self, ids: Tensor) -> Tensor:
        """Token ids [b, tokens] -> embeddings [b, d], not normalised."""
        projected: Tensor = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
        return projected


class TextTask:
    """Pictures and captions that belong together find each other in a batch; both answer questions.

    Beside each caption stands one that is wrong in a single answer (arXiv 2210.01936), so that no answer is
    too small to matter.
    """

    def __init__(
        self,
        towers: Towers,
        pictures: PictureSet,
        tokenizer: CLIPTokenizer,
        *,
        text_rate: float = 1.0,
        batch_size: int = 128,
    ) -> None:
        """`text_rate`: the text tower's share of the learning rate."""
        self.network: nn.Module = towers.to(device())
        self._towers, self._pictures, self._tokenizer = towers, pictures, tokenizer
        self._text_rate, self._batch_size = text_rate, batch_size
        self._shown = shown_labels(pictures, towers.classes)

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        reading = list(self._towers.clip.text_model.parameters())
        known = {id(parameter) for parameter in reading}
        rest = [parameter for parameter in self.network.parameters() if id(parameter) not in known]
        return [(1.0, rest), (self._text_rate, reading)]

    def batch(self, generator: torch.Generator) -> Batch:
        """ "pixels" [b, h, w, 3] bytes; "ids" [2b, tokens] of their captions and of the wrong ones; what is
        shown and what the captions tell, [b] a question."""
        chosen = torch.randint(len(self._pictures), (self._batch_size,), generator=generator)
        pixels = moved(self._pictures.pixels[chosen.numpy()], generator, 0)
        facts = [self._pictures.attributes[number] for number in chosen.tolist()]
        seeds = torch.randint(2**31, (len(facts),), generator=generator).tolist()
        classes, pairs = self._towers.classes, list(zip(facts, seeds, strict=True))
        captions = [_worded(shown, seed) for shown, seed in pairs]
        wrong = [
            _worded(mistaken(shown, classes, np.random.default_rng(seed)), seed) for shown, seed in pairs
        ]
        told = [named(shown, words) for shown, words in zip(facts, captions, strict=True)]
        return {
            "pixels": pixels,
            "ids": token_ids(self._tokenizer, captions + wrong, "longest"),
            **{f"seen {question}": found[chosen] for question, found in self._shown.items()},
            **{f"read {question}": found for question, found in class_numbers(told, classes).items()},
        }

    def losses(self, batch: Batch, generator: torch.Generator) -> Losses:  # noqa: ARG002
        pixels, ids = as_floats(batch["pixels"]), batch["ids"]
        with autocast():
            images, texts = self._towers.embed_images(pixels), self._towers.embed_texts(ids)
        images, texts = images.float(), texts.float()
        contrast = self._contrast(images, texts, ids)
        seen = question_loss(self._towers.seen, images, _labels(batch, "seen"))
        read = question_loss(self._towers.read, texts[: len(images)], _labels(batch, "read"))
        return {"loss": contrast + seen + 0.25 * read, "contrast": contrast, "seen": seen, "read": read}

    def _contrast(self, images: Tensor, texts: Tensor, ids: Tensor) -> Tensor:
        """`images` [b, d] against `texts` [2b, d]: the right captions, then the wrong ones."""
        count = len(images)
        scale = self._towers.clip.logit_scale.exp().clamp(max=50)
        logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        # The same caption twice in a batch is right for both pictures.
        same = (ids[:count, None] == ids[None]).all(-1).float()
        finds = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
        found = same[:, :count] / same[:, :count].sum(1, keepdim=True)
        return 0.5 * (finds + F.cross_entropy(logits[:, :count].T, found))


@torch.no_grad()
def text_scores(towers: Towers, pictures: PictureSet, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """Share of right answers on these pictures and captions: "seen color", "read color", ..."""
    towers.eval()
    pixels = torch.split(as_tensor(pictures.pixels), 256)
    ids = torch.split(token_ids(tokenizer, pictures.captions), 256)
    images = torch.cat([towers.embed_images(part.to(device())) for part in pixels])
    texts = torch.cat([towers.embed_texts(part.to(device())) for part in ids])
    seen = shares_right(towers.seen, images, shown_labels(pictures, towers.classes))
    read = shares_right(towers.read, texts, told_labels(pictures, towers.classes))
    return {f"seen {question}": share for question, (share, _) in seen.items()} | {
        f"read {question}": share for question, (share, _) in read.items()
    }


def save_towers(towers: Towers, folder: Path) -> None:
    """Writes `folder`/clip (CLIPModel) and `folder`/text_encoder (its text half)."""
    towers.clip.save_pretrained(folder / "clip")
    CLIPTextModel.from_pretrained(folder / "clip").save_pretrained(folder / "text_encoder")


def _labels(batch: Batch, half: str) -> dict[str, Tensor]:
    start = f"{half} "
    return {name.removeprefix(start): found for name, found in batch.items() if name.startswith(start)}


def _worded(attributes: Attributes, seed: int) -> str:
    return describe(attributes, np.random.default_rng(seed))
