"""The part of kustomize that k8s/ uses, after its documentation; whatever else a file names is refused.

resources, components, namespace, images, configMapGenerator (from files, without a hash in the name), and
patches: JSON 6902 where a target is named, strategic merge else. In kustomize's order: resources, components,
generators, patches, namespace, images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Resource = dict[str, Any]

KNOWN = {
    "apiVersion",
    "kind",
    "resources",
    "components",
    "namespace",
    "images",
    "configMapGenerator",
    "patches",
}
CLUSTER_WIDE = {"Namespace", "PriorityClass"}
# Lists that a strategic merge joins by a key (Kubernetes' `patchMergeKey`); every other list is replaced.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "topologySpreadConstraints": "topologyKey",
}
# Joined by Kubernetes under keys of several fields: refused, so that nobody relies on a guess.
UNKNOWN_LISTS = {"ports"}


def render(folder: Path) -> list[Resource]:
    """What `kustomize build FOLDER` prints, as documents in order."""
    return _accumulate(folder.resolve(), [])


def _accumulate(folder: Path, resources: list[Resource]) -> list[Resource]:
    """`resources` with those of `folder` and its changes; a component also changes what is there."""
    plan = _read(folder / "kustomization.yaml")
    if unknown := set(plan) - KNOWN:
        raise ValueError(f"{folder}: this renderer does not know {sorted(unknown)}")
    for name in plan.get("resources", ()):
        _add(
            resources,
            _accumulate(folder / name, []) if (folder / name).is_dir() else _documents(folder / name),
        )
    for name in plan.get("components", ()):
        resources = _accumulate(folder / name, resources)
    for generator in plan.get("configMapGenerator", ()):
        _add(resources, [_config_map(generator, folder)])
    for entry in plan.get("patches", ()):
        _patch(resources, entry, folder)
    for resource in resources:
        if "namespace" in plan and resource["kind"] not in CLUSTER_WIDE:
            resource["metadata"]["namespace"] = plan["namespace"]
        for image in plan.get("images", ()):
            _each_image(resource, lambda found, image=image: _image(found, image))
    return resources


def _read(path: Path) -> Mapping[str, Any]:
    plan: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return plan


def _documents(path: Path) -> list[Resource]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def identity(resource: Resource) -> tuple[str, str]:
    return resource["kind"], resource["metadata"]["name"]


def _add(resources: list[Resource], more: list[Resource]) -> None:
    for resource in more:
        if identity(resource) in map(identity, resources):
            raise ValueError(f"{identity(resource)} is there twice")
        resources.append(resource)


def _config_map(generator: Mapping[str, Any], folder: Path) -> Resource:
    options = generator.get("options", {})
    if set(generator) - {"name", "files", "options"} or not options.get("disableNameSuffixHash"):
        raise ValueError("a config map is generated from files, with disableNameSuffixHash")
    data = {name: (folder / name).read_text(encoding="utf-8") for name in generator["files"]}
    metadata = {"name": generator["name"], "labels": options.get("labels", {})}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


# ------------------------------------------------------------------------------------------------ patches
def _patch(resources: list[Resource], entry: Mapping[str, Any], folder: Path) -> None:
    content = yaml.safe_load((folder / entry["path"]).read_text(encoding="utf-8"))
    wanted = (entry["target"]["kind"], entry["target"]["name"]) if "target" in entry else identity(content)
    found = [resource for resource in resources if identity(resource) == wanted]
    if len(found) != 1:
        raise ValueError(f"{folder / entry['path']}: no resource {wanted}")
    if "target" in entry:
        jsonpatch.apply_patch(found[0], content, in_place=True)
    else:
        strategic_merge(found[0], content)


def strategic_merge(target: dict[str, Any], patch: Mapping[str, Any]) -> None:
    """Kubernetes' merge, in place: mappings by key, null removes, lists of MERGE_KEYS by their key."""
    for name, value in patch.items():
        present = target.get(name)
        if value is None:
            target.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(present, dict):
            strategic_merge(present, value)
        elif isinstance(value, list) and isinstance(present, list) and name in UNKNOWN_LISTS:
            raise ValueError(f"this renderer does not merge lists named {name}")
        elif isinstance(value, list) and isinstance(present, list) and name in MERGE_KEYS:
            _merge_list(present, value, MERGE_KEYS[name])
        else:
            target[name] = copy.deepcopy(value)


def _merge_list(target: list[Any], patch: list[Any], key: str) -> None:
    """New items go in front, as kustomize puts them."""
    by_key = {item[key]: item for item in target}
    added = []
    for item in patch:
        present = by_key.get(item[key])
        if item.get("$patch") == "delete":
            target.remove(present)
        elif present is None:
            added.append(copy.deepcopy(item))
        else:
            strategic_merge(present, item)
    target[:0] = added


# ------------------------------------------------------------------------------------------------- images
def _each_image(node: Any, change: Callable[[str], str]) -> None:
    if isinstance(node, dict):
        for name in ("containers", "initContainers"):
            for container in node.get(name) or ():
                container["image"] = change(container["image"])
        for value in node.values():
            _each_image(value, change)
    elif isinstance(node, list):
        for item in node:
            _each_image(item, change)


def _image(found: str, image: Mapping[str, str]) -> str:
    name, _, tag = found.partition(":")
    if name != image["name"]:
        return found
    tag = str(image.get("newTag", tag))
    return image.get("newName", name) + (f":{tag}" if tag else "")
