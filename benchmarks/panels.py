"""The Grafana dashboard's panels and their queries, as Grafana would ask them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

DASHBOARD = Path(__file__).parents[1] / "k8s" / "monitoring" / "dashboard.json"


@dataclass(frozen=True, slots=True)
class Target:
    """One query, and the name of its lines."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    row: str
    title: str
    unit: str
    targets: tuple[Target, ...]


def panels(path: Path = DASHBOARD) -> list[Panel]:
    """All panels in order, each with the row that it stands in."""
    found: list[Panel] = []
    row = ""
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        targets = tuple(Target(target["expr"], target["legendFormat"]) for target in panel["targets"])
        found.append(Panel(row, panel["title"], panel["fieldConfig"]["defaults"]["unit"], targets))
    return found


def filled(expr: str, *, interval: str = "5m", job: str = ".*", instance: str = ".*") -> str:
    """A query with the dashboard's variables filled in."""
    for name, value in (("__rate_interval", interval), ("instance", instance), ("job", job)):
        expr = expr.replace(f"${name}", value)
    return expr


def legend(pattern: str, labels: dict[str, str]) -> str:
    """A line's name: {{label}} becomes the label's value."""
    for name, value in labels.items():
        pattern = pattern.replace(f"{{{{{name}}}}}", value)
    return pattern
