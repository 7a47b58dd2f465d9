"""The judge of generated pictures: a small ResNet that learns the world's attributes from true pictures.

It shares nothing with the scorer, so it cannot share its blind spots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from pocket.data import PictureSet, Pixels
from pocket.labels import Classes, build_heads, question_loss, shares_right, shown_labels
from pocket.training import Batch, Losses, autocast, device
from pocket.vae import as_floats, as_tensor, moved

GATE = 0.95
_WIDTHS = (32, 64, 128, 256)


class Classifier(nn.Module):
    """Answers every question about a picture of 64 x 64."""

    def __init__(self, classes: Classes, widths: tuple[int, ...] = _WIDTHS) -> None:
        super().__init__()
        shape = ResNetConfig(
            embedding_size=widths[0],
            hidden_sizes=list(widths),
            depths=[1] * len(widths),
            layer_type="basic",
        )
        self.classes = classes
        self.backbone = ResNetModel(shape)
        # A stride of two and no pooling: 64 pixels are few.
        self.backbone.embedder.pooler = nn.Identity()
        self.heads = build_heads(widths[-1], classes)

    def embed(self, pixels: Tensor) -> Tensor:
        """Pictures [b, 3, 64, 64] in -1..1 -> [b, d]."""
        pooled: Tensor = self.backbone(pixels).pooler_output
        return pooled.flatten(1)


class ClassifierTask:
    """True pictures, moved and mirrored a little, and what they show."""

    def __init__(self, classifier: Classifier, pictures: PictureSet, batch_size: int = 64) -> None:
        self.network: nn.Module = classifier.to(device())
        classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._classifier, self._pixels, self._batch_size = classifier, pictures.pixels, batch_size
        self._labels = shown_labels(pictures, classifier.classes)

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(1.0, list(self.network.parameters()))]

    def batch(self, generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(self._pixels), (self._batch_size,), generator=generator)
        labels = {question: found[chosen] for question, found in self._labels.items()}
        return {"pixels": moved(self._pixels[chosen.numpy()], generator), **labels}

    def losses(self, batch: Batch, generator: torch.Generator) -> Losses:
        pixels = as_floats(batch["pixels"])
        # Grain, so that it does not hang on details that a generator lacks.
        grain = torch.rand((), generator=generator, device=device()) * 0.05
        pixels = pixels + grain * torch.randn(pixels.shape, generator=generator, device=device())
        with autocast():
            embedded = self._classifier.embed(pixels.contiguous(memory_format=torch.channels_last))
        return {"loss": question_loss(self._classifier.heads, embedded.float(), batch)}


@torch.no_grad()
def classifier_scores(
    classifier: Classifier, pixels: Pixels, labels: dict[str, Tensor]
) -> dict[str, tuple[float, int]]:
    """Right answers about uint8 [n, 64, 64, 3] by question, as (share, how many were asked)."""
    classifier.eval()
    blocks = torch.split(as_tensor(pixels), 256)
    embedded = torch.cat([classifier.embed(block.to(device())) for block in blocks])
    return shares_right(classifier.heads, embedded, labels)
