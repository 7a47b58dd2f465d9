"""Dashboard and alerts: every expression parses, every name in it is one that the server has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import promql_parser as promql
import pytest
import yaml

from atelier_server.core import BaseInfo
from atelier_server.messages import Heartbeat
from atelier_server.metrics import PREFIX, TABLE, Metrics
from benchmarks.panels import DASHBOARD, Panel, filled, panels

ROOT = Path(__file__).parents[3]
RULES = ROOT / "k8s" / "monitoring" / "prometheusrule.yaml"
RUNBOOK = ROOT / "docs" / "runbook.md"
# What Prometheus itself adds to every series of a target.
TARGET = {"job", "instance", "namespace", "pod"}
ROWS = ["Requests", "Queue", "Device and VRAM", "Adapters", "Trainings", "Health"]
KNOWN_VALUES = {PREFIX + metric.name: dict(metric.labels) for metric in TABLE}
BASE = BaseInfo("p", "f", "0", 8, 8, "e", "d", 7, 1, "cpu", "x", "float32", 9, (("torch", "2"),))
RULE_FILE: dict[str, Any] = yaml.safe_load(RULES.read_text(encoding="utf-8"))
RULE_LIST: list[dict[str, Any]] = [r for group in RULE_FILE["spec"]["groups"] for r in group["rules"]]
ALERTS = [rule for rule in RULE_LIST if "alert" in rule]


def live() -> dict[str, set[str]]:
    """Names of the series that a server has, with their labels, read from a registry that has seen work."""
    metrics = Metrics()
    metrics.call_began("Generate")
    metrics.call_ended("Generate", "OK", 1.0)
    metrics.heartbeat(Heartbeat(0, 0, 0, (), 0, 0, 0), BASE)
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


LIVE = live()
RECORDED = {rule["record"] for rule in RULE_LIST if "record" in rule}


def selectors(node: Any) -> Iterator[promql.VectorSelector]:
    """Every metric that an expression names."""
    match node:
        case promql.VectorSelector():
            yield node
        case promql.MatrixSelector():
            yield node.vector_selector
        case promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from selectors(node.expr)
        case promql.BinaryExpr():
            yield from selectors(node.lhs)
            yield from selectors(node.rhs)
        case promql.Call():
            for argument in node.args:
                yield from selectors(argument)


def groupings(node: Any) -> Iterator[str]:
    """Every label that an expression groups or joins by."""
    match node:
        case promql.AggregateExpr():
            yield from node.modifier.labels if node.modifier else ()
            yield from groupings(node.expr)
        case promql.BinaryExpr():
            matching = node.modifier.matching if node.modifier else None
            yield from matching.labels if matching else ()
            yield from groupings(node.lhs)
            yield from groupings(node.rhs)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from groupings(node.expr)
        case promql.Call():
            for argument in node.args:
                yield from groupings(argument)


def problems(expr: str) -> list[str]:
    """What in an expression the server does not have. Raises ValueError where it does not parse."""
    tree = promql.parse(filled(expr))
    found, reachable = [], set(TARGET)
    for selector in selectors(tree):
        name = str(selector.name)
        labels = TARGET | LIVE.get(name, set())
        if name not in LIVE and name not in RECORDED and name != "up":
            found.append(f"no metric {name}")
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        for matcher in selector.matchers.matchers:
            if matcher.name not in labels:
                found.append(f"{name} has no label {matcher.name}")
            known = KNOWN_VALUES.get(base, {}).get(matcher.name)
            if known:
                found += [f"{matcher.name} is never {v}" for v in matcher.value.split("|") if v not in known]
        reachable |= labels
    found += [f"nothing here has a label {label}" for label in groupings(tree) if label not in reachable]
    return found


# ------------------------------------------------------------------------------------------ the dashboard
@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel.title)
def test_a_panel_asks_for_what_there_is(panel: Panel) -> None:
    for target in panel.targets:
        assert problems(target.expr) == []
        assert 'job=~"$job",instance=~"$instance"' in target.expr
        tree = promql.parse(filled(target.expr))
        labels = {*groupings(tree), *TARGET}
        assert set(re.findall(r"\{\{(\w+)\}\}", target.legend)) <= labels


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert dashboard["uid"] == "atelier"
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance"]
    assert variables["datasource"]["type"] == "datasource"
    assert [p["title"] for p in dashboard["panels"] if p["type"] == "row"] == ROWS
    ids = [p["id"] for p in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"]
            assert panel["targets"]
    for annotation in dashboard["annotations"]["list"]:
        assert problems(annotation["expr"]) == []


def test_no_two_panels_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_the_dashboard_shows_every_metric() -> None:
    asked = "".join(target.expr for panel in panels() for target in panel.targets)
    assert [m.name for m in TABLE if PREFIX + m.name not in asked] == []


# ----------------------------------------------------------------------------------------------- the rules
@pytest.mark.parametrize("rule", RULE_LIST, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_what_there_is(rule: dict[str, Any]) -> None:
    assert problems(rule["expr"]) == []


def test_recorded_names_say_level_metric_operation() -> None:
    assert all(re.fullmatch(r"(job|instance):atelier_\w+:\w+", name) for name in RECORDED)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"\d+m", rule["for"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert ROOT / page == RUNBOOK
    headings = re.findall(r"^## (.+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
    used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
    tree = promql.parse(rule["expr"])
    labels = TARGET | {label for s in selectors(tree) for label in LIVE.get(str(s.name), ())}
    assert used <= labels | {"device"}


def test_the_runbook_has_no_entry_for_an_alert_that_is_not() -> None:
    headings = re.findall(r"^## (Atelier\w+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [rule["alert"] for rule in ALERTS]


def promtool() -> str:
    """The tool that `make tools` unpacks; a machine without it fails."""
    found = shutil.which("promtool") or next(map(str, (ROOT / "tools").glob("**/bin/promtool")), None)
    assert found, "promtool is missing: run `make tools`"
    return found


def test_the_rules_do_as_promtool_says(tmp_path: Path) -> None:
    cases = Path(__file__).with_name("alerts_test.yaml")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULE_FILE["spec"]))
    shutil.copy(cases, tmp_path)
    for command in (("check", "rules", "rules.yaml"), ("test", "rules", cases.name)):
        done = subprocess.run(
            [promtool(), *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_in_its_test() -> None:
    cases = yaml.safe_load(Path(__file__).with_name("alerts_test.yaml").read_text(encoding="utf-8"))
    fired = {
        test["alertname"] for case in cases["tests"] for test in case["alert_rule_test"] if test["exp_alerts"]
    }
    quiet = {
        test["alertname"]
        for case in cases["tests"]
        for test in case["alert_rule_test"]
        if not test["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in ALERTS}
    assert {"AtelierErrorBudgetBurnFast", "AtelierErrorBudgetBurnSlow", "AtelierDown"} <= quiet


# --------------------------------------------------------------------------- the check itself sees mistakes
@pytest.mark.parametrize(
    ("expr", "problem"),
    [
        ("sum(rate(atelier_image_total[5m]))", "no metric atelier_image_total"),
        ('atelier_queue_depth{knd="train"}', "atelier_queue_depth has no label knd"),
        ('atelier_queue_depth{kind="paint"}', "kind is never paint"),
        ('atelier_request_duration_seconds_count{code=~"OK|NOT_OK"}', "code is never NOT_OK"),
        ("sum by (methd) (atelier_requests_in_progress)", "nothing here has a label methd"),
    ],
)
def test_a_mistake_is_seen(expr: str, problem: str) -> None:
    assert problems(expr) == [problem]


def test_codes_are_grpcs() -> None:
    known = KNOWN_VALUES[f"{PREFIX}request_duration_seconds"]["code"]
    assert known == tuple(code.name for code in grpc.StatusCode)


def test_an_expression_that_does_not_parse_is_seen() -> None:
    with pytest.raises(ValueError, match="parenthes"):
        problems("sum(rate(atelier_images_total[5m])")
