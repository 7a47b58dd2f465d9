"""What k8s/ renders to is valid, and says nothing that the server does not know."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator

from atelier_server import app
from atelier_server.config import Settings
from atelier_server.config.reading import read
from atelier_server.rpc.health import SERVICES
from tests.unit.k8s.kustomize import Resource, identity, render

ROOT = Path(__file__).parents[3]
OPERATIONS = ROOT / "docs" / "operations.md"
OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())
VERSIONS = ("1.32", "1.34", "1.37")
CUSTOM = {
    "ServiceMonitor": prometheus_operator.ServiceMonitor,
    "PrometheusRule": prometheus_operator.PrometheusRule,
}
# One entry a `kubectl create secret` of the operations page.
CREATED = re.compile(r"create secret (?:tls|generic) (\S+) (.*)")


@pytest.fixture(params=OVERLAYS)
def resources(request: pytest.FixtureRequest) -> list[Resource]:
    return render(ROOT / "k8s" / "overlays" / request.param)


def one(resources: list[Resource], kind: str, name: str = "atelier") -> Resource:
    [found] = [resource for resource in resources if identity(resource) == (kind, name)]
    return found


def pod(resources: list[Resource]) -> dict[str, Any]:
    spec: dict[str, Any] = one(resources, "StatefulSet")["spec"]["template"]["spec"]
    return spec


def server(resources: list[Resource]) -> dict[str, Any]:
    [container] = pod(resources)["containers"]
    return container


def settings(resources: list[Resource]) -> Settings:
    """What the server makes of the ConfigMap; raises BadSettings as it would."""
    return read([], one(resources, "ConfigMap")["data"])[0]


# ------------------------------------------------------------------------------------------------- valid
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(resources: list[Resource], version: str) -> None:
    for resource in resources:
        if resource["kind"] not in CUSTOM:
            kubernetes_validate.validate(resource, version, strict=True)


def test_the_prometheus_operator_knows_every_field(resources: list[Resource]) -> None:
    for resource in resources:
        if model := CUSTOM.get(resource["kind"]):
            known = model.model_validate(resource).model_dump(mode="json", by_alias=True, exclude_unset=True)
            assert known == resource


def test_config_maps_can_be_applied(resources: list[Resource]) -> None:
    """`kubectl apply` keeps a copy in an annotation, which may have 256 KiB."""
    sizes = {r["metadata"]["name"]: len(json.dumps(r)) for r in resources if r["kind"] == "ConfigMap"}
    assert {name: size for name, size in sizes.items() if size > 200_000} == {}


def test_a_misspelt_field_is_seen(resources: list[Resource]) -> None:
    server(resources)["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(one(resources, "StatefulSet"), VERSIONS[-1], strict=True)


# --------------------------------------------------------------------------------- the server's own names
def test_settings_are_the_servers(resources: list[Resource]) -> None:
    """`read` refuses unknown variables, values out of range, and an open port without TLS and tokens."""
    assert settings(resources).host == "0.0.0.0"


def test_ports_are_where_the_server_listens(resources: list[Resource]) -> None:
    told = settings(resources)
    ports = {port["name"]: port["containerPort"] for port in server(resources)["ports"]}
    assert ports == {"grpc": told.port, "health": told.health_port, "metrics": told.metrics_port}
    for name in ("atelier", "atelier-servers"):
        assert {port["targetPort"] for port in one(resources, "Service", name)["spec"]["ports"]} <= set(ports)
    for rule in one(resources, "NetworkPolicy")["spec"]["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= set(ports)


def test_probes_ask_for_services_that_exist(resources: list[Resource]) -> None:
    container, told = server(resources), settings(resources)
    probes = {kind: container[f"{kind}Probe"]["grpc"] for kind in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {told.health_port}
    assert {probes[kind]["service"] for kind in ("startup", "readiness")} <= set(SERVICES)
    assert "service" not in probes["liveness"]


def test_the_grace_period_holds_a_whole_drain(resources: list[Resource]) -> None:
    told = settings(resources)
    drain = told.notice_seconds + told.drain_seconds + app._CHECKPOINT_SECONDS + app._GRACE_SECONDS
    assert pod(resources)["terminationGracePeriodSeconds"] >= drain + 15  # for the worker to go


def test_the_monitor_finds_the_metrics_port(resources: list[Resource]) -> None:
    monitors = [resource for resource in resources if resource["kind"] == "ServiceMonitor"]
    for monitor in monitors:
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        services = [
            r for r in resources if r["kind"] == "Service" and wanted <= r["metadata"]["labels"].items()
        ]
        names = [port["name"] for service in services for port in service["spec"]["ports"]]
        assert [names.count(endpoint["port"]) for endpoint in monitor["spec"]["endpoints"]] == [1]
    assert len(monitors) == (not settings(resources).insecure)


# ------------------------------------------------------------------------------------------ what is named
def created_secrets() -> dict[str, set[str]]:
    """Name to keys, of the secrets that docs/operations.md creates."""
    found: dict[str, set[str]] = {}
    for name, rest in CREATED.findall(OPERATIONS.read_text(encoding="utf-8").replace("\\\n", "")):
        keys = {"tls.crt", "tls.key"} if "--cert=" in rest else set()
        keys |= set(re.findall(r"--from-(?:file|literal)=([\w.-]+)", rest))
        found.setdefault(name, set()).update(keys)
    return found


def missing(resources: list[Resource]) -> Iterator[str]:
    """What the server's pod refers to, and neither the manifests nor the operations page make."""
    spec, container = pod(resources), server(resources)
    claims = {c["metadata"]["name"] for c in one(resources, "StatefulSet")["spec"]["volumeClaimTemplates"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    wanted = [("ServiceAccount", spec["serviceAccountName"]), ("PriorityClass", spec["priorityClassName"])]
    wanted += [("ConfigMap", s["configMapRef"]["name"]) for s in container["envFrom"] if "configMapRef" in s]
    wanted += [("Secret", s["secretRef"]["name"]) for s in container["envFrom"] if "secretRef" in s]
    wanted += [("Secret", v["secret"]["secretName"]) for v in volumes.values() if "secret" in v]
    there = {identity(resource) for resource in resources} | {("Secret", name) for name in created_secrets()}
    yield from (f"{kind} {name}" for kind, name in wanted if (kind, name) not in there)
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    yield from (f"volume {name}" for name in mounts - set(volumes) - claims)


def test_everything_that_is_named_exists(resources: list[Resource]) -> None:
    assert list(missing(resources)) == []


def test_a_secret_that_nobody_makes_is_seen(resources: list[Resource]) -> None:
    server(resources)["envFrom"].append({"secretRef": {"name": "nobodys"}})
    pod(resources)["volumes"].append({"name": "x", "secret": {"secretName": "also-nobodys"}})
    assert list(missing(resources)) == ["Secret nobodys", "Secret also-nobodys"]


def test_the_servers_files_are_keys_of_mounted_secrets(resources: list[Resource]) -> None:
    told, secrets = settings(resources), created_secrets()
    volumes = {volume["name"]: volume for volume in pod(resources)["volumes"]}
    mounts = {Path(m["mountPath"]): volumes.get(m["name"], {}) for m in server(resources)["volumeMounts"]}
    for path in filter(None, (told.cert_file, told.key_file, told.client_ca_file, told.tokens_file)):
        assert path.name in secrets[mounts[path.parent]["secret"]["secretName"]]
    assert told.data_dir in mounts


# ----------------------------------------------------------------------------------------------- restraint
def test_the_pod_keeps_to_the_restricted_standard(resources: list[Resource]) -> None:
    spec, container = pod(resources), server(resources)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = container["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False  # they would say ATELIER_PORT=tcp://...
    assert (
        one(resources, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
    )


def test_a_gpu_is_asked_for_where_it_is_used(resources: list[Resource]) -> None:
    gpus = server(resources)["resources"]["limits"].get("nvidia.com/gpu", 0)
    tolerated = {toleration["key"] for toleration in pod(resources).get("tolerations", ())}
    assert (gpus, "nvidia.com/gpu" in tolerated) == (
        (1, True) if settings(resources).device == "cuda" else (0, False)
    )


def test_selectors_select_the_pod(resources: list[Resource]) -> None:
    labels = one(resources, "StatefulSet")["spec"]["template"]["metadata"]["labels"].items()
    assert one(resources, "StatefulSet")["spec"]["selector"]["matchLabels"].items() <= labels
    assert one(resources, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels
    assert one(resources, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels
    for name in ("atelier", "atelier-servers"):
        assert one(resources, "Service", name)["spec"]["selector"].items() <= labels


def test_the_dockerfile_and_the_manifests_agree() -> None:
    """One user, one data directory, ports that are declared."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    resources = render(ROOT / "k8s" / "overlays" / "single-gpu")
    context, told = pod(resources)["securityContext"], settings(resources)
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile
    assert f'VOLUME ["{told.data_dir}"]' in dockerfile
    assert f"EXPOSE {told.port} {told.metrics_port}" in dockerfile
