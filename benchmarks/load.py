"""A real server under load: strangers come and go, one training runs, Prometheus scrapes, nothing may leak.

200 requests of 20 adapters arrive as a Poisson process, at 0.7 of what the machine paints. What the dashboard
asks for is asked of Prometheus afterwards, and drawn to docs/images/dashboard.webp.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from atelier import Client
from atelier.v1 import generation_pb2 as pb
from atelier.v1.generation_pb2_grpc import GenerationServiceStub
from atelier_server import pocket
from benchmarks import picture
from benchmarks.bases import random_adapters
from benchmarks.harness import Row, meets
from benchmarks.panels import Panel, filled, panels
from benchmarks.prometheus import Prometheus, Series, scraping
from benchmarks.serving import Serving, health, serving
from benchmarks.visitors import EXPECTED, KILLED, Visit, killed, kinds, visit, wish

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / "docs" / "images" / "dashboard.webp"
_REQUESTS, _ADAPTERS, _STEPS, _LOAD = 200, 20, 10, 0.7
_WARM_UP = 12  # requests before the visitors
_PROBE_SECONDS = 0.05
_SETTLE_SECONDS = 60.0
_INTERVAL = "15s"  # $__rate_interval at one scrape a second
_GAUGES = (
    "atelier_requests_in_progress",
    "atelier_queue_depth",
    "atelier_images_in_progress",
    'atelier_training_jobs{state="running"}',
    'atelier_training_jobs{state="queued"}',
    'atelier_vram_component_bytes{component="training"}',
)


Answers = list[tuple[Panel, list[list[Series]]]]  # a panel, and the series of each of its queries


@dataclass(slots=True)
class Watched:
    """What was seen from outside while the load ran: seconds a health check, (time, bytes) a process."""

    health: list[float] = field(default_factory=list)
    memory: dict[str, list[tuple[float, int]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seen:
    """What is judged. `counted`: Generate calls to which the server gave a status."""

    visits: list[Visit]
    watched: Watched
    left: dict[str, float]
    answers: Answers
    counted: int
    broken_rules: int


def run(*, quick: bool) -> list[Row]:
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    requests, adapters, steps = (10, 3, 3) if quick else (_REQUESTS, _ADAPTERS, _STEPS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            serving(folder / "data", "--metrics-port", "0", "--log-format", "json") as server,
            scraping(folder / "prometheus", [f"127.0.0.1:{server.metrics_port}"]) as prometheus,
            Client(server.address) as client,
        ):
            names = _import(client, folder / "adapters", adapters)
            began = time.time()
            with _watching(server) as watched, _training(client):
                gap = _seconds_a_request(client, names, steps) / _LOAD
                wishes = _wishes(requests, names, steps)
                visits = asyncio.run(_visit(server.address, wishes, gap))
            left = _left_over(server)
            answers = _ask(prometheus, began, time.time())
            broken = [rule["name"] for rule in prometheus.rules() if rule["health"] != "ok"]
            seen = Seen(visits, watched, left, answers, _counted(server), len(broken))
        picture.draw(answers, folder / "dashboard.webp" if quick else IMAGE)
    return _rows(seen, quick)


# ------------------------------------------------------------------------------------------------- the load
def _import(client: Client, folder: Path, count: int) -> list[str]:
    files = random_adapters(folder, Path(pocket.__file__).parent, count=count, rank=8)
    for file in files:
        client.import_adapter(file, file.stem)
    return [file.stem for file in files]


def _seconds_a_request(client: Client, names: list[str], steps: int) -> float:
    """What a request takes of the machine beside the training, when eight share their forwards."""

    def paint(number: int) -> None:
        client.generate(
            "a red octopus", adapters=names[number % len(names)], num_inference_steps=steps, scheduler="ddim"
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(paint, range(_WARM_UP - 8)))
        before = time.perf_counter()
        list(pool.map(paint, range(8)))
    return (time.perf_counter() - before) / 8


def _wishes(count: int, names: list[str], steps: int) -> list[tuple[str, pb.GenerateRequest]]:
    """Kinds of visitors and what they ask for; the same in every run."""
    chance = random.Random(0)
    return [(kind, wish(chance, names, steps)) for kind in kinds(count, chance)]


async def _visit(address: str, wishes: list[tuple[str, pb.GenerateRequest]], gap: float) -> list[Visit]:
    """The visitors, on average one in `gap` seconds."""
    chance = random.Random(1)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GenerationServiceStub(channel)
        under_way = []
        for kind, request in wishes:
            call = killed(address, request) if kind == KILLED else visit(stub, kind, request)
            under_way.append(asyncio.create_task(call))
            await asyncio.sleep(chance.expovariate(1 / gap))
        return await asyncio.gather(*under_way)


@contextmanager
def _training(client: Client) -> Iterator[None]:
    """One training for as long as the block runs; cancelled then, its stream read to its end."""
    events = client.train(
        "load",
        folder=ROOT / "examples" / "otto",
        instance_prompt="a sks blue plush octopus",
        max_train_steps=20_000,
        checkpointing_steps=100,
        validation_prompts=["a sks blue plush octopus"],
        validation_steps=8,
    )
    with ThreadPoolExecutor(1) as pool:
        first = next(events)
        reading = pool.submit(lambda: [first, *events])
        try:
            yield
        finally:
            client.cancel_training("load")
            reading.result(timeout=120)


# ----------------------------------------------------------------------------------------- seen from outside
@contextmanager
def _watching(server: Serving) -> Iterator[Watched]:
    watched = Watched()
    done = threading.Event()
    threads = [
        threading.Thread(target=_probe, args=(server.address, watched, done)),
        threading.Thread(target=_weigh, args=(server, watched, done)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield watched
    finally:
        done.set()
        for thread in threads:
            thread.join()


def _probe(address: str, watched: Watched, done: threading.Event) -> None:
    """Asks for the server's health, as a kubelet does, but twenty times a second."""
    with grpc.insecure_channel(address) as channel:
        while not done.wait(_PROBE_SECONDS):
            before = time.perf_counter()
            health(channel)
            watched.health.append(time.perf_counter() - before)


def _weigh(server: Serving, watched: Watched, done: threading.Event) -> None:
    page, processes = os.sysconf("SC_PAGE_SIZE"), {"front": server.pid, "worker": server.worker_pid}
    while not done.wait(0.5):
        for name, pid in processes.items():
            resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
            watched.memory.setdefault(name, []).append((time.monotonic(), resident))


def _scrape(server: Serving) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def _left_over(server: Serving) -> dict[str, float]:
    """Gauges that are not zero once everything has ended."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        up = {n: v for n, v in _scrape(server).items() if v and n.startswith(_GAUGES)}
        if not up or time.monotonic() > deadline:
            return up
        time.sleep(0.5)


def _counted(server: Serving) -> int:
    """Generate calls that the server ended with a status."""
    prefix = "atelier_request_duration_seconds_count"
    return int(sum(v for n, v in _scrape(server).items() if n.startswith(prefix) and '"Generate"' in n))


def _ask(prometheus: Prometheus, began: float, ended: float) -> Answers:
    """Every panel with the series that each of its queries gives."""
    step = max(1.0, (ended - began) / 240)
    return [
        (
            panel,
            [
                prometheus.query_range(filled(target.expr, interval=_INTERVAL), began, ended, step)
                for target in panel.targets
            ],
        )
        for panel in panels()
    ]


# ------------------------------------------------------------------------------------------------- results
def drift(points: list[tuple[float, int]]) -> float:
    """Growth over the second half of a run as a share of its mean: slope of the regression times duration."""
    middle = (points[0][0] + points[-1][0]) / 2
    times, sizes = zip(*[(t, size) for t, size in points if t >= middle], strict=True)
    slope, _ = statistics.linear_regression(times, sizes)
    return float(slope * (times[-1] - times[0]) / statistics.mean(sizes))


def _rows(seen: Seen, quick: bool) -> list[Row]:
    empty = [panel.title for panel, answers in seen.answers if not all(answers)]
    strange = [v for v in seen.visits if v.code not in EXPECTED[v.kind]]
    lost = len(seen.visits) + _WARM_UP - seen.counted
    statuses = Counter(f"{v.kind}: {v.code}" for v in seen.visits)
    print(*(f"{count:4d}  {status}" for status, count in sorted(statuses.items())), sep="\n")
    print(*(f"stays up: {name} {value}" for name, value in seen.left.items()), sep="\n")
    print(*(f"no series: {title}" for title in empty), sep="\n")
    read = [v.seconds for v in seen.visits if v.kind == "reads" and v.code == "OK"]
    checks = seen.watched.health
    return [
        _row("requests", "calls", len(seen.visits)),
        _row("streams without a status", "calls", lost, "<= 0"),
        _row("streams with another status than expected", "calls", len(strange), "<= 0"),
        _row("time of a request that is read to its end, median", "s", statistics.median(read), samples=read),
        _row("health, p99", "s", quantile(sorted(checks), 0.99), None if quick else "<= 0.1", checks),
        *(
            _row(
                f"resident memory of the {name}, drift of the second half",
                "share",
                abs(drift(points)),
                None if quick else "<= 0.02",  # a short run is all warming up
                [size for _, size in points],
            )
            for name, points in seen.watched.memory.items()
        ),
        _row("gauges that stay up", "series", len(seen.left), "<= 0"),
        _row("panels with an empty query", "panels", len(empty), "<= 0"),
        _row("rules that Prometheus cannot evaluate", "rules", seen.broken_rules, "<= 0"),
    ]


def quantile(ordered: list[float], q: float) -> float:
    """The smallest value that at least a share `q` does not exceed."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _row(case: str, unit: str, value: float, target: str | None = None, samples: Sequence[float] = ()) -> Row:
    """There is no peer: `ratio` is the quantity itself."""
    met = None if target is None else meets(value, target)
    return Row(
        case, value, 0.0, unit, value, target, met, {"ours": [round(s, 5) for s in samples], "peer": []}
    )
