"""A real Prometheus on loopback, for as long as a run lasts."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RULES = ROOT / "k8s" / "monitoring" / "prometheusrule.yaml"
SCRAPE_SECONDS = 1
_START_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its labels, and its finite samples as (seconds since 1970, value)."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]


def tool(name: str) -> str:
    """A program that `make tools` unpacks, or one on the PATH. Raises FileNotFoundError."""
    found = shutil.which(name, path=str(ROOT / "tools" / "bin")) or shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is missing: run `make tools`")
    return found


class Prometheus:
    """Its HTTP API (https://prometheus.io/docs/prometheus/latest/querying/api/)."""

    def __init__(self, url: str) -> None:
        self._url = url

    def _get(self, path: str, **parameters: object) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{query}", timeout=60) as response:
            answer = json.load(response)
        if answer["status"] != "success":
            raise RuntimeError(f"Prometheus: {answer.get('error')}")
        return answer["data"]

    def ready(self) -> bool:
        """Whether it has scraped all of its targets."""
        try:
            targets = self._get("targets")["activeTargets"]
        except (urllib.error.URLError, ConnectionError):
            return False
        return bool(targets) and all(target["health"] == "up" for target in targets)

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[Series]:
        """Series with at least one finite sample."""
        data = self._get("query_range", query=expr, start=start, end=end, step=step)
        found = []
        for result in data["result"]:
            values = ((float(t), float(v)) for t, v in result["values"])
            points = tuple((t, v) for t, v in values if math.isfinite(v))
            if points:
                found.append(Series(dict(result["metric"]), points))
        return found

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, with its health and, for an alert, its state, once each has been evaluated."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            found = [rule for group in self._get("rules")["groups"] for rule in group["rules"]]
            if time.monotonic() > deadline or all(rule["health"] != "unknown" for rule in found):
                return found
            time.sleep(0.1)


@contextmanager
def scraping(folder: Path, targets: list[str], job: str = "atelier") -> Iterator[Prometheus]:
    """Prometheus with the project's own rules, once it has scraped `targets` (HOST:PORT)."""
    folder.mkdir(parents=True)
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))["spec"]
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    configuration = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": "5s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": job, "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{_free_port()}"
    command = [
        tool("prometheus"),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://{address}")
        deadline = time.monotonic() + _START_SECONDS
        while not prometheus.ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus: {(folder / 'prometheus.log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield prometheus
    finally:
        process.terminate()
        process.wait(timeout=30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
