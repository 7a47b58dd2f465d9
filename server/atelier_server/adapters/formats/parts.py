"""What the end of a key says: which part of a layer's change the tensor is.

The parts go by the names of `kinds.PARTS`, kohya's and LyCORIS'; other tools' names become those.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# The whole end of a key after the module -> the part.
_ENDS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"{pattern}\Z"), part)
    for pattern, part in {
        # PEFT; in between may lie the adapter's name ("default").
        r"\.lora_A(?:\.[\w-]+)?\.weight": "lora_down.weight",
        r"\.lora_B(?:\.[\w-]+)?\.weight": "lora_up.weight",
        r"\.lora_magnitude_vector(?:\.[\w-]+){0,2}": "magnitude",
        # kohya's scripts, LyCORIS.
        r"\.(lora_(?:down|up|mid)\.weight)": r"\1",
        r"\.(alpha|dora_scale|diff|diff_b|w_norm|b_norm)": r"\1",
        r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12]|w[12]_[ab]|t[12]))": r"\1",
        # diffusers before PEFT; to_q_lora lay below the attention's processor.
        r"(?:[._]lora|\.lora_linear_layer)\.down\.weight": "lora_down.weight",
        r"(?:[._]lora|\.lora_linear_layer)\.up\.weight": "lora_up.weight",
        # ai-toolkit's DoRA.
        r"\.magnitude": "magnitude",
    }.items()
)
# Changes that are known by name and not supported: the refusal says so.
_FOREIGN = re.compile(
    r"\.(?:(?P<oft>oft_\w+|boft_\w+|oft_R.*)|(?P<glora>(?:a|b)[12]\.weight)|(?P<ia3>on_input)"
    r"|(?P<bias>lora_[AB](?:\.[\w-]+)?\.bias|lora_(?:up|down)\.bias|bias)|(?P<set>set_weight|reshape_weight))$"
)
_FOREIGN_NAMES = {
    "oft": "an orthogonal change (OFT)",
    "glora": "a GLoRA change",
    "ia3": "an IA3 change",
    "bias": "a bias of its own",
    "set": "a replaced weight",
}


@dataclass(frozen=True, slots=True)
class Key:
    """A tensor's key: the module as it is spelled, and the part."""

    module: str
    part: str

    @classmethod
    def of(cls, key: str) -> Key | None:
        """None for a key that is no part of an adapter."""
        for pattern, part in _ENDS:
            if match := pattern.search(key, 1):  # some module has to be left
                return cls(key[: match.start()], match.expand(part))
        return None


def foreign(key: str) -> str:
    """What an unknown key is, in words: a kind of change that is not supported, or nothing of an adapter."""
    match = _FOREIGN.search(key)
    if match and match.lastgroup:
        return f"{_FOREIGN_NAMES[match.lastgroup]}, which is not supported"
    return "is not a tensor of an adapter"
