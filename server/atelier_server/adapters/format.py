"""LoRA files: reading what other tools write, writing what they read. safetensors only, never pickle.

Every file becomes the canonical form: A, B and alpha of each changed layer, by the layer's real name inside
the pipeline ("unet.mid_block.attentions.0....to_q"); its change is alpha/r * B A. Alphas are per layer in all
layouts, which is more than diffusers itself reads from kohya files (research note: quirks of mixed alphas).

    diffusers  unet.NAME.lora_A.weight        alphas in the header, key lora_adapter_metadata (JSON)
    peft       base_model.model.NAME.lora_A.weight        likewise
    kohya      lora_unet_NAME_WITH_UNDERSCORES.lora_down.weight, .alpha
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule, finite
from atelier_server.errors import AdapterMismatch, UnsupportedFormat

Layout = Literal["diffusers", "peft", "kohya"]
METADATA_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY

_PREFIX = {"diffusers": "unet.", "peft": "base_model.model.", "kohya": "lora_unet_"}
_TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
# NAME, then which of the layer's tensors: PEFT's and diffusers' names, older diffusers', kohya's.
_PARTS = re.compile(
    r"(?P<module>.+?)"
    r"(?:(?:\.lora_(?P<peft>[AB])(?:\.default)?|[._]lora\.(?P<old>down|up)|\.lora_(?P<kohya>down|up))\.weight"
    r"|\.(?P<alpha>alpha))"
)
_ROLE = {"A": "A", "down": "A", "B": "B", "up": "B", "alpha": "alpha"}
_MODULE_PATH = re.compile(r"[A-Za-z0-9_.]+")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_adapter(path: Path, module_names: Iterable[str]) -> tuple[CanonicalAdapter, Layout]:
    """Reads a file of any layout for a base whose layers have `module_names` ("unet.conv_in", ...).

    Raises UnsupportedFormat for what is no LoRA in safetensors and AdapterMismatch for layers that the base
    does not have or values that are not finite; both name the first offender. Shapes are the bank's to check.
    """
    adapter, layout = _canonical(*_read_tensors(path), module_names)
    for name, module in adapter.low_rank.items():
        if not (finite(module.A) and finite(module.B)):
            raise AdapterMismatch(f"the adapter has values in {name} that are not finite", {"module": name})
    return adapter, layout


def write_adapter(
    adapter: CanonicalAdapter,
    path: Path,
    layout: Layout = "diffusers",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `adapter` with its true alphas and `metadata` in the header; equal adapters give equal bytes.

    Raises UnsupportedFormat for an unknown layout, OSError as files do.
    """
    if layout not in get_args(Layout):
        raise UnsupportedFormat(f"layout {layout!r} is none of {', '.join(get_args(Layout))}")
    if len(adapter.low_rank) < len(adapter.modules) or adapter.tokens:
        raise UnsupportedFormat(f"layout {layout!r} cannot hold all that this adapter has")
    tensors: dict[str, Tensor] = {}
    for name, module in adapter.low_rank.items():
        bare = name.removeprefix("unet.")
        if layout == "kohya":
            key = _PREFIX[layout] + bare.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = module.A
            tensors[f"{key}.lora_up.weight"] = module.B
            tensors[f"{key}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
        else:
            tensors[f"{_PREFIX[layout]}{bare}.lora_A.weight"] = module.A
            tensors[f"{_PREFIX[layout]}{bare}.lora_B.weight"] = module.B
    header = {"format": "pt", **(metadata or {})}
    if layout != "kohya":
        header[METADATA_KEY] = json.dumps(_config(adapter, layout), sort_keys=True)
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    path.write_bytes(_sorted_header(safetensors.torch.save(plain, header)))


# --------------------------------------------------------------------------------------------------- reading
def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as file:
        begin = file.read(4)
    if begin.startswith((b"PK\x03\x04", b"\x80")):
        raise UnsupportedFormat("this is a pickle, which could run code; convert it to safetensors first")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise UnsupportedFormat(f"this is not a whole safetensors file: {error}") from error


def _canonical(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], module_names: Iterable[str]
) -> tuple[CanonicalAdapter, Layout]:
    if not tensors:
        raise UnsupportedFormat("the file holds no tensors")
    keys = tuple(sorted(tensors))
    layout = _detect(keys[0])
    for key in keys:
        if tensors[key].dtype not in _FLOATS:
            raise UnsupportedFormat(f"{key} is not a tensor of a LoRA", {"key": key})
    alphas = _Alphas.of(header.get(METADATA_KEY))
    modules = {
        name: _module(name, {role: tensors[key] for role, key in roles}, alphas)
        for name, roles in _plan(keys, layout, frozenset(module_names))
    }
    return CanonicalAdapter(modules), layout


def _detect(first: str) -> Layout:
    """By a tensor's name. All of a file's names must be of one layout; `_plan` sees to that."""
    if first.startswith("lora_"):
        return "kohya"
    if first.startswith(_PREFIX["peft"]):
        return "peft"
    if first.startswith(("unet.", *_TEXT_ENCODERS)) or _PARTS.fullmatch(first):
        return "diffusers"
    raise UnsupportedFormat(f"{first} is not a tensor of a LoRA")


# Adapters of one recipe have the same names: what they mean is worked out once.
@lru_cache(maxsize=64)
def _plan(
    keys: tuple[str, ...], layout: Layout, names: frozenset[str]
) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Layers in order, each with its (role, key) pairs; roles are "A", "B" and "alpha"."""
    known = (
        {name.removeprefix("unet.").replace(".", "_"): name for name in names} if layout == "kohya" else {}
    )
    parts: dict[str, dict[str, str]] = {}
    for key in keys:
        if key.removeprefix("base_model.model.").startswith(_TEXT_ENCODERS):
            raise UnsupportedFormat(
                f"{key} belongs to a text encoder; those are not supported yet", {"key": key}
            )
        match = _PARTS.fullmatch(key)
        if match is None:
            raise UnsupportedFormat(f"{key} is not a tensor of a LoRA", {"key": key})
        bare = match["module"].removeprefix(_PREFIX[layout])
        name = known.get(bare, "") if layout == "kohya" else "unet." + _modern(bare.removeprefix("unet."))
        if name not in names:
            raise AdapterMismatch(f"the base model has no layer for {key}", {"key": key})
        role = _ROLE[next(part for part in match.groups()[1:] if part)]
        if parts.setdefault(name, {}).setdefault(role, key) != key:
            raise UnsupportedFormat(f"{key} repeats the {role} of {name}", {"key": key})
    return tuple((name, tuple(parts[name].items())) for name in sorted(parts))


def _modern(module: str) -> str:
    """In old diffusers files LoRA lies below the attention's processor, and `to_out` means `to_out.0`."""
    module = module.replace(".processor.", ".")
    return f"{module}.0" if module.endswith(".to_out") else module


def _module(name: str, parts: Mapping[str, Tensor], alphas: _Alphas) -> LoraModule:
    missing = {"A", "B"} - parts.keys()
    if missing:
        raise UnsupportedFormat(f"{name} lacks its {min(missing)} weights", {"module": name})
    A, B = parts["A"], parts["B"]
    if A.dim() < 2 or B.dim() < 2 or A.shape[0] != B.shape[1]:
        raise UnsupportedFormat(
            f"{name} has A of shape {tuple(A.shape)} and B of {tuple(B.shape)}", {"module": name}
        )
    if "alpha" not in parts:
        alpha = alphas.of_layer(name.removeprefix("unet."), A.shape[0])
    elif parts["alpha"].numel() == 1:
        alpha = parts["alpha"].item()
    else:
        raise UnsupportedFormat(f"the alpha of {name} is not one number", {"module": name})
    if not math.isfinite(alpha):
        raise AdapterMismatch(f"the adapter has an alpha in {name} that is not finite", {"module": name})
    return LoraModule(A, B, alpha)


@dataclass(frozen=True, slots=True)
class _Alphas:
    """The alphas that a header tells, in the words of peft.LoraConfig; without one alpha is the rank."""

    lora_alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    @classmethod
    def of(cls, text: str | None) -> _Alphas:
        if text is None:
            return cls()
        try:
            # pipe.save_lora_weights prefixes its keys by component, unet.save_lora_adapter does not.
            config = {key.removeprefix("unet."): value for key, value in json.loads(text).items()}
            default = config.get("lora_alpha")
            pattern = {str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()}
            lora_alpha = None if default is None else float(default)
        except (ValueError, TypeError, AttributeError) as error:
            raise UnsupportedFormat(f"the header's {METADATA_KEY} cannot be read: {error}") from error
        for key in pattern:
            # PEFT takes these as regular expressions; a stranger's are not run here.
            if not _MODULE_PATH.fullmatch(key):
                raise UnsupportedFormat(f"alpha_pattern {key!r} is not a layer's name")
        return cls(lora_alpha, pattern, bool(config.get("use_rslora", False)))

    def of_layer(self, name: str, rank: int) -> float:
        """Like PEFT: the first pattern that is the layer's name or the end of it, else the common alpha."""
        matches = (v for k, v in self.alpha_pattern.items() if name == k or name.endswith(f".{k}"))
        alpha = next(matches, self.lora_alpha)
        if alpha is None:
            return float(rank)
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


# --------------------------------------------------------------------------------------------------- writing
def _config(adapter: CanonicalAdapter, layout: Layout) -> dict[str, Any]:
    """The arguments of peft.LoraConfig that rebuild the adapter; diffusers prefixes them by component."""
    modules = {name.removeprefix("unet."): module for name, module in sorted(adapter.low_rank.items())}
    ranks = {name: module.A.shape[0] for name, module in modules.items()}
    alphas = {name: module.alpha for name, module in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": list(modules),
    }
    return {f"unet.{key}": value for key, value in config.items()} if layout == "diffusers" else config


def _sorted_header(file: bytes) -> bytes:
    """The same safetensors file with its header in a fixed order; the library's differs from run to run."""
    (size,) = struct.unpack("<Q", file[:8])
    header = json.dumps(json.loads(file[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + file[8 + size :]
