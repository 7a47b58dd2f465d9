"""PEFT's configuration: alphas that are not in the tensors. A file of its own, or in a diffusers header.

adapter_config.json                   {"r": 8, "lora_alpha": 16, "alpha_pattern": {"to_out.0": 4}, ...}
header, lora_adapter_metadata         the same by component: {"unet.r": 8, "text_encoder.r": 4, ...}
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.adapters.formats.container import Container, read_json
from atelier_server.errors import UnsupportedFormat

METADATA_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_MODULE_PATH = re.compile(r"[A-Za-z0-9_.]+")
_TYPES = ("LORA", "LOHA", "LOKR")
# With these the trained change is not (only) that of the tensors, or is of another base.
_UNREADABLE = (
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "arrow_config",
)
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What of a peft.PeftConfig decides about alphas. Without one, alpha is the rank."""

    peft_type: str = "LORA"
    rank: float | None = None
    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PeftConfig:
        """Raises UnsupportedFormat for values that are none and options that are not supported."""
        if found := [key for key in _UNREADABLE if config.get(key)]:
            raise UnsupportedFormat(f"PEFT's option {found[0]} is not supported")
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
            raise UnsupportedFormat(
                f"init_lora_weights={start[:40]!r} belongs to a base that it changed itself; save the "
                "adapter with path_initial_model_for_weight_conversion"
            )
        kind = str(config.get("peft_type") or "LORA").removeprefix("PeftType.").upper()
        if kind not in _TYPES:
            raise UnsupportedFormat(f"peft_type {kind[:40]!r} is none of {', '.join(_TYPES)}")
        try:
            # LoHa's and LoKr's configurations say `alpha`.
            alpha = config.get("lora_alpha", config.get("alpha"))
            pattern = {str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
            rank = config.get("r")
            read = cls(
                kind,
                None if rank is None else float(rank),
                None if alpha is None else float(alpha),
                {_bare(key): value for key, value in pattern.items()},
                bool(config.get("use_rslora", False)),
            )
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise UnsupportedFormat(f"PEFT's configuration cannot be read: {error}") from error
        for key in read.alpha_pattern:
            # PEFT takes these as regular expressions; a stranger's are not run here.
            if not _MODULE_PATH.fullmatch(key):
                raise UnsupportedFormat(f"alpha_pattern {key[:80]!r} is not a layer's name")
        return read

    def alpha_of(self, name: str, rank: int) -> float | None:
        """The alpha of a module (name without component), None if the configuration has none.

        Like PEFT: the first pattern that is the module's name or the end of it, else the common alpha.
        """
        name = _bare(name)
        matches = (v for k, v in self.alpha_pattern.items() if name == k or name.endswith(f".{k}"))
        alpha = next(matches, self.alpha)
        if alpha is None:
            return None
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def configs_of(container: Container) -> dict[str, PeftConfig]:
    """The configurations by component; "" where the file says none. Raises UnsupportedFormat."""
    configs: dict[str, PeftConfig] = {}
    if container.config is not None:
        configs[""] = PeftConfig.of(container.config)
    text = container.metadata.get(METADATA_KEY)
    if text is None:
        return configs
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in read_json(text, f"the header's {METADATA_KEY}").items():
        component, dot, rest = key.partition(".")
        if dot and component in _COMPONENTS:
            by_component.setdefault(component, {})[rest] = value
        else:
            by_component.setdefault("", {})[key] = value
    return configs | {component: PeftConfig.of(config) for component, config in by_component.items()}


def config_for(modules: Mapping[str, LoraModule], *, use_dora: bool) -> dict[str, Any]:
    """The arguments of peft.LoraConfig that rebuild these modules (names without component)."""
    ranks = {name: module.rank for name, module in sorted(modules.items())}
    alphas = {name: _plain(module.alpha) for name, module in sorted(modules.items())}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": list(ranks),
    }
    return {**config, "use_dora": True} if use_dora else config


def header_for(adapter: CanonicalAdapter, *, prefix_unet: bool) -> dict[str, Any]:
    """What diffusers keeps under METADATA_KEY: the configurations with their components as prefixes."""
    header: dict[str, Any] = {}
    for component in _COMPONENTS:
        modules = component_of(adapter, component)
        if modules:
            dora = any(module.magnitude is not None for module in modules.values())
            prefix = f"{component}." if prefix_unet or component != "unet" else ""
            header |= {f"{prefix}{key}": value for key, value in config_for(modules, use_dora=dora).items()}
    return header


def component_of(adapter: CanonicalAdapter, component: str) -> dict[str, LoraModule]:
    """The low-rank modules of a component, by their names in it.

    PEFT matches names by their ends: without the level `text_model` they fit any version of transformers.
    """
    prefix = f"{component}."
    return {
        _bare(name.removeprefix(prefix)): module
        for name, module in adapter.low_rank.items()
        if name.startswith(prefix)
    }


def _plain(alpha: float) -> float | int:
    """Whole numbers as such: peft declares lora_alpha an int."""
    return int(alpha) if alpha == int(alpha) else alpha


def _bare(name: str) -> str:
    """Without the level that transformers 5 took out of CLIPTextModel: old and new names are then equal."""
    return name.removeprefix("text_model.")
