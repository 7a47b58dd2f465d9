"""The renderer that stands in for kustomize: each thing it does, by a case of kustomize's documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.k8s.kustomize import render, strategic_merge

POD: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "web"},
    "spec": {
        "template": {
            "spec": {
                "containers": [
                    {
                        "name": "web",
                        "image": "web:1",
                        "args": ["a", "b"],
                        "env": [{"name": "A", "value": "1"}],
                    }
                ]
            }
        }
    },
}


def _write(folder: Path, plan: dict[str, Any], **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(plan))
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return _write(tmp_path / "base", {"resources": ["pod.yaml"]}, pod=POD)


def _overlay(base: Path, patch: Any, **entry: Any) -> dict[str, Any]:
    plan = {"resources": ["../base"], "patches": [{"path": "patch.yaml", **entry}]}
    [rendered] = render(_write(base.parent / "overlay", plan, patch=patch))
    return rendered


def test_a_strategic_merge_joins_containers_by_name_and_replaces_other_lists(base: Path) -> None:
    container = {"name": "web", "args": ["c"], "env": [{"name": "B", "value": "2"}]}
    patch = {
        **POD,
        "spec": {"template": {"spec": {"containers": [container, {"name": "log", "image": "log"}]}}},
    }
    containers = _overlay(base, patch)["spec"]["template"]["spec"]["containers"]
    assert [found["name"] for found in containers] == ["log", "web"]
    assert containers[1]["args"] == ["c"]
    assert containers[1]["image"] == "web:1"
    assert {entry["name"] for entry in containers[1]["env"]} == {"A", "B"}


def test_null_removes_a_field_and_patch_delete_an_item() -> None:
    target = {"a": 1, "b": {"c": 2}, "volumes": [{"name": "x"}, {"name": "y"}]}
    strategic_merge(target, {"a": None, "b": {"d": 3}, "volumes": [{"name": "x", "$patch": "delete"}]})
    assert target == {"b": {"c": 2, "d": 3}, "volumes": [{"name": "y"}]}


def test_a_json_patch_goes_to_its_target(base: Path) -> None:
    operations = [{"op": "replace", "path": "/spec/template/spec/containers/0/args/1", "value": "z"}]
    rendered = _overlay(base, operations, target={"kind": "Deployment", "name": "web"})
    assert rendered["spec"]["template"]["spec"]["containers"][0]["args"] == ["a", "z"]


def test_images_and_namespace(base: Path) -> None:
    plan = {
        "resources": ["../base"],
        "namespace": "shop",
        "images": [{"name": "web", "newName": "example.com/web", "newTag": "2"}],
    }
    [rendered] = render(_write(base.parent / "overlay", plan))
    assert rendered["metadata"]["namespace"] == "shop"
    assert rendered["spec"]["template"]["spec"]["containers"][0]["image"] == "example.com/web:2"


def test_a_component_adds_to_and_changes_what_is_there(base: Path) -> None:
    patch = {"kind": "Deployment", "metadata": {"name": "web", "labels": {"seen": "yes"}}}
    plan = {
        "patches": [{"path": "patch.yaml"}],
        "configMapGenerator": [
            {"name": "more", "files": ["patch.yaml"], "options": {"disableNameSuffixHash": True}}
        ],
    }
    _write(base.parent / "part", plan, patch=patch)
    overlay = _write(base.parent / "overlay", {"resources": ["../base"], "components": ["../part"]})
    web, more = render(overlay)
    assert web["metadata"]["labels"] == {"seen": "yes"}
    assert yaml.safe_load(more["data"]["patch.yaml"]) == patch


@pytest.mark.parametrize(
    ("plan", "patch"),
    [
        ({"resources": ["../base"], "replicas": [{"name": "web", "count": 2}]}, None),
        ({"resources": ["../base", "../base"]}, None),
        ({"resources": ["../base"], "configMapGenerator": [{"name": "x", "literals": ["a=b"]}]}, None),
        ({"resources": ["../base"], "patches": [{"path": "patch.yaml"}]}, {**POD, "kind": "StatefulSet"}),
        (
            {"resources": ["../base"], "patches": [{"path": "patch.yaml"}]},
            {**POD, "spec": {"template": {"spec": {"containers": [{"name": "web", "ports": []}]}}}},
        ),
    ],
    ids=["unknown field", "twice", "unknown generator", "no such resource", "ports"],
)
def test_what_it_does_not_know_it_refuses(base: Path, plan: dict[str, Any], patch: Any) -> None:
    pod = {
        **POD,
        "spec": {"template": {"spec": {"containers": [{"name": "web", "image": "web:1", "ports": [1]}]}}},
    }
    (base / "pod.yaml").write_text(yaml.safe_dump(pod))
    with pytest.raises(ValueError):
        render(_write(base.parent / "overlay", plan, patch=patch))
