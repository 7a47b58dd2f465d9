"""What the trainer can do: the front refuses the rest by name, before a picture is read."""

from __future__ import annotations

from atelier_server.core import TrainingAbilities
from atelier_server.diffusion.base import BaseModel
from atelier_server.training.optimizers import optimizers_on
from atelier_server.training.precision import precisions_on

# The methods of this trainer.
METHODS = ("lora", "dreambooth", "textual_inversion", "pivotal")
# Fields of a recipe that it does not heed yet.
UNHEEDED: tuple[str, ...] = ()
_END_OF_WORD = "</w>"


# Methods that change the U-Net's own weights, and those that learn in the text encoders at every step.
_OF_WHOLE_WEIGHTS = {"dreambooth"}
_OF_TEXTS = {"textual_inversion", "pivotal"}


def abilities(base: BaseModel) -> TrainingAbilities:
    """With this base on its device. An inpainting base is not taught at all: its U-Net wants a mask, too.

    Quantised weights are too coarse to be changed themselves; LoRA learns on top of them. Text encoders that
    rest in CPU memory learn nothing.
    """
    texts_rest = any(name in base.offloaded for name in base.family.text_encoders)
    without = {*(_OF_WHOLE_WEIGHTS if base.quantization else ()), *(_OF_TEXTS if texts_rest else ())}
    if base.inpainting:
        without |= set(METHODS)
    texts = ("train_text_encoder",) if texts_rest and "train_text_encoder" not in UNHEEDED else ()
    return TrainingAbilities(
        methods=tuple(method for method in METHODS if method not in without),
        optimizers=optimizers_on(base.device),
        precisions=precisions_on(base.device, base.dtype),
        unheeded=(*UNHEEDED, *texts),
        vocabulary=_vocabulary(base),
    )


def _vocabulary(base: BaseModel) -> frozenset[str]:
    """Whole words and special tokens of its tokenizers. CLIP's mark ends of words, and know no capitals."""
    return frozenset(
        piece.removesuffix(_END_OF_WORD).lower()
        for encoder in base.encoders
        for piece in encoder.tokenizer.get_vocab()
        if piece.endswith(_END_OF_WORD) or piece in encoder.tokenizer.all_special_tokens
    )
