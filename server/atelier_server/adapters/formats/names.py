"""Every name that the ecosystem has for a module of the base, and back.

A module is found by its flat name: underscores for dots, as kohya's scripts write it. Dotted names become
flat ones, so that there is one table. The U-Net's modules are also known by their names in the original code
("sgm": input_blocks, middle_block, output_blocks), which kohya's SDXL files and ComfyUI use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

ANY = ""
"""The component of a key that does not say which it belongs to."""

# Prefix -> (component, layout); the longest that fits counts.
_PREFIXES = {
    "lora_unet_": ("unet", "kohya"),
    "lora_te_": ("text_encoder", "kohya"),
    "lora_te1_": ("text_encoder", "kohya"),
    "lora_te2_": ("text_encoder_2", "kohya"),
    "lycoris_": (ANY, "lycoris"),
    "unet.": ("unet", "diffusers"),
    "text_encoder.": ("text_encoder", "diffusers"),
    "text_encoder_2.": ("text_encoder_2", "diffusers"),
    "base_model.model.unet.": ("unet", "peft"),
    "base_model.model.text_encoder.": ("text_encoder", "peft"),
    "base_model.model.text_encoder_2.": ("text_encoder_2", "peft"),
    "base_model.model.": (ANY, "peft"),
    "diffusion_model.": ("unet", "comfyui"),
    "model.diffusion_model.": ("unet", "comfyui"),
    "text_encoders.clip_l.transformer.": ("text_encoder", "comfyui"),
    "text_encoders.clip_h.transformer.": ("text_encoder", "comfyui"),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", "comfyui"),
}
_BY_LENGTH = sorted(_PREFIXES, key=len, reverse=True)
# transformers 5 took this level out of CLIPTextModel (not out of the one with a projection).
_TEXT_MODEL = "text_model."
# Older diffusers named the text encoders' projections like the U-Net's.
_TEXT_ALIASES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


@dataclass(frozen=True, slots=True)
class Spelled:
    """A key's module as it is written: its component (or ANY), layout, and name without the prefix."""

    component: str
    layout: str
    name: str

    @classmethod
    def of(cls, module: str) -> Spelled:
        """`module` is a key without the part of the layer ("lora_unet_conv_in")."""
        for prefix in _BY_LENGTH:
            if module.startswith(prefix):
                return cls(*_PREFIXES[prefix], module.removeprefix(prefix))
        return cls(ANY, "diffusers", module)


@dataclass(frozen=True)
class ModuleNames:
    """The modules of a base, by real name ("unet.conv_in"), with the shapes of their weights."""

    shapes: Mapping[str, tuple[int, ...]]

    def find(self, spelled: Spelled) -> str | None:
        """The real name of a module, None if the base has none of that name."""
        name = _flat(spelled.name)
        components = [spelled.component] if spelled.component else list(self._tables)
        found = (self._tables.get(component, {}).get(name) for component in components)
        return next((real for real in found if real), None)

    def sgm(self, name: str) -> str:
        """The original code's name of one of the U-Net's modules, both without component."""
        return self._sgm.get(name, name)

    @cached_property
    def _tables(self) -> dict[str, dict[str, str]]:
        """Flat name -> real name, by component."""
        tables: dict[str, dict[str, str]] = {}
        for real in self.shapes:
            component, _, name = real.partition(".")
            table = tables.setdefault(component, {})
            for alias in self._aliases(component, name):
                table.setdefault(_flat(alias), real)
        return tables

    def _aliases(self, component: str, name: str) -> Iterable[str]:
        yield name
        if component == "unet":
            yield name.removesuffix(".0") if name.endswith(".to_out.0") else name
            yield self.sgm(name)
            return
        bare = name.removeprefix(_TEXT_MODEL)
        yield from (bare, _TEXT_MODEL + bare)
        stem, _, last = bare.rpartition(".")
        if last in _TEXT_ALIASES:
            old = f"{stem}.{_TEXT_ALIASES[last]}"
            yield from (old, _TEXT_MODEL + old)

    @cached_property
    def _sgm(self) -> dict[str, str]:
        unet = [real.removeprefix("unet.") for real in self.shapes if real.startswith("unet.")]
        blocks = _sgm_blocks(unet)
        names = {}
        for name in unet:
            if name in _ENDS:
                names[name] = _ENDS[name]
                continue
            match = _BLOCK.match(name)
            if match and match[0] in blocks:
                rest = name.removeprefix(match[0]).removeprefix(".")
                if ".resnets." in match[0]:
                    rest = _RESNET.get(rest, rest)
                names[name] = f"{blocks[match[0]]}.{rest}" if rest else blocks[match[0]]
        return names


_BLOCK = re.compile(
    r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:resnets\.\d+|attentions\.\d+|(?:down|up)samplers\.0\.conv)"
)


def _sgm_blocks(names: Iterable[str]) -> dict[str, str]:
    """The original name of every resnet, attention and sampler: they are counted through all blocks."""
    present = {match[0] for name in names if (match := _BLOCK.match(name))}
    found: dict[str, str] = {}
    for side, blocks, first in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        place, block = first, 0
        while f"{side}_blocks.{block}.resnets.0" in present:
            layer = 0
            while f"{side}_blocks.{block}.resnets.{layer}" in present:
                found[f"{side}_blocks.{block}.resnets.{layer}"] = f"{blocks}.{place}.0"
                found[f"{side}_blocks.{block}.attentions.{layer}"] = f"{blocks}.{place}.1"
                place, layer = place + 1, layer + 1
            sampler = f"{side}_blocks.{block}.{side}samplers.0.conv"
            if sampler in present and side == "down":
                found[sampler] = f"{blocks}.{place}.0.op"
                place += 1
            elif sampler in present:
                attention = f"{side}_blocks.{block}.attentions.0" in present
                found[sampler] = f"{blocks}.{place - 1}.{1 + attention}.conv"
            block += 1
    found["mid_block.resnets.0"] = "middle_block.0"
    found["mid_block.attentions.0"] = "middle_block.1"
    found["mid_block.resnets.1"] = "middle_block.2"
    return found


def _flat(name: str) -> str:
    # In older diffusers files the weights lie below the attention's processor.
    return name.replace(".processor.", ".").replace(".", "_").replace("_processor_", "_")
