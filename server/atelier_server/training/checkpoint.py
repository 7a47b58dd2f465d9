"""What a training needs to go on to the same bits, as safetensors and JSON (no pickle).

training-state.safetensors     every tensor: weights, moments, generators' states
training-state.json            everything else, and where in it which tensor belongs

The state is a tree of dicts and lists, as torch's state_dicts are; keys are words. Whatever moves in a
training gives a branch of it and takes it back: `state_dict`, `load_state_dict`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.core import Recipe

Tree = dict[str, Any]

_TENSORS = "training-state.safetensors"
_REST = "training-state.json"
_FORMAT = 2
_TENSOR = "$tensor"
# What may change between two runs of a training without changing what it learns.
_NOT_LEARNED = frozenset({"priority", "keep_last", "keep_every", "validation_prompts", "validation_steps"})


def write_state(tree: Tree, folder: Path) -> None:
    """Writes both files. Raises OSError as files do."""
    tensors: dict[str, Tensor] = {}
    rest = {"format": _FORMAT, "state": _without_tensors(tree, "", tensors)}
    # Not save_file: its own error hides that the disk is full.
    (folder / _TENSORS).write_bytes(safetensors.torch.save(tensors))
    (folder / _REST).write_text(json.dumps(rest, sort_keys=True))


def read_state(folder: Path) -> Tree:
    """What `write_state` wrote, on the CPU.

    Raises OSError, SafetensorError, ValueError, KeyError or TypeError for files that are missing or damaged.
    """
    tensors = safetensors.torch.load((folder / _TENSORS).read_bytes())
    rest = json.loads((folder / _REST).read_text())
    if "format" not in rest:
        return _first_format(tensors, rest)
    if rest["format"] != _FORMAT:
        raise ValueError(f"its format is {rest['format']}, {_FORMAT} is known")
    tree: Tree = _with_tensors(rest["state"], tensors)
    return tree


def recipe_sha256(recipe: Recipe) -> str:
    """Of all that decides about what is learned. What has its default does not count: later versions may
    have more of it."""
    told = {
        field.name: getattr(recipe, field.name)
        for field in fields(recipe)
        if field.name not in _NOT_LEARNED and getattr(recipe, field.name) != field.default
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def check_state(tree: Tree, recipe: Recipe, *, step: int, base_sha256: str, phase: str) -> None:
    """Raises ValueError where it is another training's, or of another step."""
    if (tree["step"], tree["batch_size"]) != (step, recipe.train_batch_size):
        raise ValueError(f"the state is of step {tree['step']} and batches of {tree['batch_size']}")
    for name, own in (
        ("recipe_sha256", recipe_sha256(recipe)),
        ("base_sha256", base_sha256),
        ("phase", phase),
    ):
        if tree.get(name, own) != own:
            raise ValueError(f"the {name} is {tree[name]!r}, here it is {own!r}")


def weights_in(tree: Tree, adapter: CanonicalAdapter) -> Mapping[str, Tensor]:
    """All that was learned. Version 0.1 had it only in the adapter."""
    return tree.get("weights") or {
        f"{name}.{part}": tensor
        for name, module in adapter.low_rank.items()
        for part, tensor in (("A", module.A), ("B", module.B))
    }


def _without_tensors(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        # A copy: two branches may hold one tensor, which safetensors refuses.
        tensors[path] = node.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(node, Mapping):
        return {key: _without_tensors(value, f"{path}/{key}", tensors) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_without_tensors(value, f"{path}/{index}", tensors) for index, value in enumerate(node)]
    return node


def _with_tensors(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensors[node[_TENSOR]]
        return {key: _with_tensors(value, tensors) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_tensors(value, tensors) for value in node]
    return node


def _first_format(tensors: dict[str, Tensor], rest: Tree) -> Tree:
    """Of version 0.1: Adam's moments as NAME.KEY, weights only in the adapter."""
    generator = tensors.pop("generator")
    moments: Tree = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(".")
        moments.setdefault(name, {})[moment] = value
    return {
        "step": rest["step"],
        "batch_size": rest["batch_size"],
        "generator": generator,
        "order": {"": {"permutation": rest["order"], "cursor": rest["cursor"]}},
        "learning": {
            "optimizer": {"state": moments, "groups": [{"lr": rate} for rate in rest["learning_rates"]]},
            "lr_scheduler": rest["lr_scheduler"],
        },
    }
