"""Adapter files as other tools write them: their own key names, spelled out, not taken from our code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from atelier_server.adapters.canonical import LoraModule

Changes = Mapping[str, LoraModule]
Write = Callable[[Changes, Path], Path]


def changes_for(
    components: Mapping[str, nn.Module], *, mixed: bool, seed: int = 0, size: float = 0.2
) -> dict[str, LoraModule]:
    """Random LoRA for every linear and convolution layer, by real name; `mixed`: each its own rank and alpha.

    Alphas are numbers that float32 holds exactly, as most files do.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, LoraModule] = {}
    for component, root in components.items():
        for name, layer in root.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            number = len(found)
            rank = 1 + number % 5 if mixed else 4
            alpha = (0.5, 1.0, 3.0, 8.0, 0.25)[number % 5] * (1 + number % 3) if mixed else 2.0
            out, *features = layer.weight.shape
            A = torch.randn(rank, *features, generator=generator) * size
            B = torch.randn(out, rank, *(1 for _ in features[1:]), generator=generator) * size
            found[f"{component}.{name}"] = LoraModule(A, B, alpha)
    return found


def save(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None) -> Path:
    safetensors.torch.save_file({key: t.contiguous() for key, t in tensors.items()}, path, dict(header or {}))
    return path


def split(name: str) -> tuple[str, str]:
    """Component, and the name in it as transformers 4 and all tools of its time know it."""
    component, _, bare = name.partition(".")
    if component == "text_encoder":
        bare = f"text_model.{bare}"
    return component, bare


# ---------------------------------------------------------------------------------------------------- kohya
def kohya(changes: Changes, path: Path, *, sdxl: bool | None = None, sgm: bool = False) -> Path:
    """networks/lora.py of sd-scripts; OneTrainer's KOHYA and ai-toolkit's files have the same names."""
    sdxl = any(name.startswith("text_encoder_2.") for name in changes) if sdxl is None else sdxl
    te = "lora_te1_" if sdxl else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": te, "text_encoder_2": "lora_te2_"}
    tensors = {}
    for name, module in changes.items():
        component, bare = split(name)
        bare = to_sgm(bare, changes) if sgm and component == "unet" else bare
        key = prefixes[component] + bare.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = module.A
        tensors[f"{key}.lora_up.weight"] = module.B
        tensors[f"{key}.alpha"] = torch.tensor(module.alpha)
    return save(tensors, path, {"ss_network_module": "networks.lora", "ss_sd_scripts_commit_hash": "abc"})


def kohya_sgm(changes: Changes, path: Path) -> Path:
    """sdxl_train_network.py names the U-Net's modules as the original code does."""
    return kohya(changes, path, sgm=True)


def to_sgm(name: str, changes: Changes) -> str:
    """Of the tiny bases' U-Nets: one resnet a down block, two an up block, two blocks each way."""
    places = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    # With attention beside it the upsampler is the third of its block's parts, else the second.
    attention = any(found.startswith("unet.up_blocks.0.attentions") for found in changes)
    places["up_blocks.0.upsamplers.0.conv"] = f"output_blocks.1.{1 + attention}.conv"
    inner = {
        ".conv1": ".in_layers.2",
        ".conv2": ".out_layers.3",
        ".time_emb_proj": ".emb_layers.1",
        ".conv_shortcut": ".skip_connection",
    }
    for old, new in places.items():
        if name == old or name.startswith(f"{old}."):
            rest = name.removeprefix(old)
            return new + (inner.get(rest, rest) if ".resnets." in old else rest)
    raise AssertionError(name)


# ------------------------------------------------------------------------------------------------ diffusers
def diffusers(changes: Changes, path: Path) -> Path:
    """pipe.save_lora_weights of today: PEFT's names and configurations in the header."""
    tensors = {}
    header: dict[str, object] = {}
    for component in sorted({name.partition(".")[0] for name in changes}):
        prefix = f"{component}."
        own = {n.removeprefix(prefix): m for n, m in changes.items() if n.startswith(prefix)}
        for name, module in own.items():
            tensors[f"{component}.{name}.lora_A.weight"] = module.A
            tensors[f"{component}.{name}.lora_B.weight"] = module.B
        config = peft_config(own)
        header |= {f"{component}.{key}": value for key, value in config.items()}
    return save(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})


def diffusers_0_20(changes: Changes, path: Path) -> Path:
    """Of mid 2023, with the alphas beside the weights; text encoders by transformers 4's names."""
    tensors = {}
    for name, module in changes.items():
        component, bare = split(name)
        key = f"{component}.{bare}.{'lora' if component == 'unet' else 'lora_linear_layer'}."
        tensors[f"{key}down.weight"] = module.A
        tensors[f"{key}up.weight"] = module.B
        tensors[f"{component}.{bare}.alpha"] = torch.tensor(module.alpha)
    return save(tensors, path)


# ----------------------------------------------------------------------------------------------------- peft
def peft_config(modules: Mapping[str, LoraModule]) -> dict[str, object]:
    """The arguments of peft.LoraConfig; the common rank and alpha are the first module's."""
    first = next(iter(modules.values()))
    return {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {n: m.rank for n, m in modules.items() if m.rank != first.rank},
        "alpha_pattern": {n: m.alpha for n, m in modules.items() if m.alpha != first.alpha},
        "target_modules": sorted(modules),
        "use_rslora": False,
        "bias": "none",
    }


def peft_folder(changes: Changes, folder: Path) -> Path:
    """model.save_pretrained of each component, as PEFT's DreamBooth example leaves them."""
    for component in sorted({name.partition(".")[0] for name in changes}):
        prefix = f"{component}."
        own = {n.removeprefix(prefix): m for n, m in changes.items() if n.startswith(prefix)}
        (folder / component).mkdir(parents=True)
        tensors = {}
        for name, module in own.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = module.A
            tensors[f"base_model.model.{name}.lora_B.weight"] = module.B
        save(tensors, folder / component / "adapter_model.safetensors")
        (folder / component / "adapter_config.json").write_text(json.dumps(peft_config(own)))
    return folder


# ------------------------------------------------------------------------------------------------ the rest
def onetrainer(changes: Changes, path: Path) -> Path:
    """OneTrainer's COMFY format: diffusers' names of the text encoders below ComfyUI's, sgm in the U-Net."""
    prefixes = {
        "unet": "diffusion_model.",
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
    }
    tensors = {}
    for name, module in changes.items():
        component, bare = split(name)
        key = prefixes[component] + (to_sgm(bare, changes) if component == "unet" else bare)
        tensors[f"{key}.lora_A.weight"] = module.A
        tensors[f"{key}.lora_B.weight"] = module.B
        tensors[f"{key}.alpha"] = torch.tensor(module.alpha)
    return save(tensors, path, {"ot_branch": "master", "modelspec.title": "x"})


def onetrainer_legacy(changes: Changes, path: Path) -> Path:
    """Kohya's prefixes before diffusers' names, lora_te1 also where there is one text encoder."""
    return kohya(changes, path, sdxl=True)


def ai_toolkit_peft(changes: Changes, path: Path) -> Path:
    """Its peft_format: PEFT's names for the parts and no alphas, which are then the ranks."""
    tensors = {}
    for name, module in changes.items():
        component, bare = split(name)
        key = f"{component}.{bare}"
        tensors[f"{key}.lora_A.weight"] = module.A
        tensors[f"{key}.lora_B.weight"] = module.B * (module.alpha / module.rank)
    return save(tensors, path, {"software": json.dumps({"name": "ai-toolkit"})})


EVERY_FORMAT: dict[str, Write] = {
    "kohya": kohya,
    "kohya-sgm": kohya_sgm,
    "diffusers": diffusers,
    "diffusers-0.20": diffusers_0_20,
    "peft": peft_folder,
    "onetrainer-comfy": onetrainer,
    "onetrainer-legacy": onetrainer_legacy,
    "ai-toolkit-peft": ai_toolkit_peft,
}
