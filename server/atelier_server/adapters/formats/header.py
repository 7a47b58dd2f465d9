"""What a file's header tells of itself: trigger words, software, family, training. Labels, no truths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from atelier_server.adapters.canonical import CanonicalAdapter

MAX_VALUE = 2000
"""Characters of a value that are kept; tag counts of large data sets run to megabytes."""
MAX_ENTRIES = 200

_KEPT = (
    "ss_",
    "modelspec.",
    "ot_",
    "sshs_",
    "atelier.",
    "software",
    "training_info",
    "name",
    "step",
    "version",
)
_NEVER = ("modelspec.thumbnail",)
_SOFTWARE = (
    ("atelier.", "Atelier"),
    ("ot_", "OneTrainer"),
    ("ss_sd_scripts_commit_hash", "kohya sd-scripts"),
    ("lora_adapter_metadata", "diffusers"),
    ("ss_network_module", "kohya sd-scripts"),
)
_TRIGGERS = (
    "atelier.triggers",
    "modelspec.trigger_phrase",
    "ss_trigger_words",
    "trigger_words",
    "trigger_word",
    "trigger",
)
# What headers call the families, more special names first.
_FAMILIES = (
    ("sdxl", ("sdxl", "stable-diffusion-xl", "sd_xl")),
    ("sd2", ("sd_v2", "sd2", "stable-diffusion-v2", "stable-diffusion-2")),
    ("sd1", ("sd_v1", "sd1", "stable-diffusion-v1", "stable-diffusion-1", "sd_1.5")),
    ("flux", ("flux",)),
    ("sd3", ("sd3", "stable-diffusion-3")),
)
_FAMILY_KEYS = ("modelspec.architecture", "ss_base_model_version", "baseModel", "ss_base_model")


def kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries about training and origin, each of at most MAX_VALUE characters."""
    chosen = [key for key in sorted(metadata) if key.startswith(_KEPT) and key not in _NEVER]
    return {
        key: value if len(value) <= MAX_VALUE else f"{value[:MAX_VALUE]} ... ({len(value)} characters)"
        for key in chosen[:MAX_ENTRIES]
        if len(key) <= MAX_VALUE and (value := metadata[key]) is not None
    }


def software(metadata: Mapping[str, str]) -> str:
    """The tool that wrote the file, "" if the header does not tell."""
    named = _object(metadata.get("software", "")).get("name")
    if isinstance(named, str):
        return _clean(named[:80])
    found = (name for key, name in _SOFTWARE if any(entry.startswith(key) for entry in metadata))
    return next(found, "")


def family(metadata: Mapping[str, str]) -> str:
    """The family of bases that the header names, "" if none."""
    if metadata.get("ss_v2", "").lower() == "true":
        return "sd2"
    text = " ".join(metadata.get(key, "")[:MAX_VALUE].lower() for key in _FAMILY_KEYS)
    return next((name for name, words in _FAMILIES if any(word in text for word in words)), "")


def triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The words that call the subject up, where the header names them."""
    found: dict[str, None] = {}
    for key in _TRIGGERS:
        for word in _words(metadata.get(key, "")[:MAX_VALUE]):
            found[word] = None
        if found:
            break  # the others say the same in other words
    return tuple(found)


def _words(text: str) -> Iterator[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    for word in value if isinstance(value, list) else [value]:
        if isinstance(word, str) and word.strip():
            yield _clean(word.strip())


def _clean(text: str) -> str:
    """Without halves of characters, which JSON can hold and no message can."""
    return text.encode("utf-8", "replace").decode()


def _object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# The names that A1111, ComfyUI and Civitai go by (kohya's scripts; ModelSpec 1.0.1).
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


def describe(adapter: CanonicalAdapter) -> dict[str, str]:
    """The entries of a file's header that tell other tools what it is; what its own header told is kept."""
    told = dict(adapter.source)
    if adapter.family in _ARCHITECTURES:
        told["modelspec.sai_model_spec"] = "1.0.1"
        told["modelspec.architecture"] = f"{_ARCHITECTURES[adapter.family]}/lora"
        told["ss_base_model_version"] = _BASES[adapter.family]
        told["ss_v2"] = str(adapter.family == "sd2")
    if adapter.triggers:
        told["modelspec.trigger_phrase"] = ", ".join(adapter.triggers)
        told["atelier.triggers"] = json.dumps(adapter.triggers)
    if largest := adapter.largest:
        told["ss_network_module"] = "networks.lora"
        told["ss_network_dim"] = str(largest.rank)
        told["ss_network_alpha"] = repr(largest.alpha)
    return told
