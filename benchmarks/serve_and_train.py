"""Pictures and a training on one core: what both together keep of what each does alone.

Ours is one server. The peer is a server of diffusers and a plain training script, two processes side by side
on the same core, both with passive OpenMP waiting. A request of eight guided pictures (16 rows) is painted
all the time; the training has batches of one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from math import nan
from pathlib import Path
from statistics import quantiles
from time import perf_counter, sleep

import grpc

from atelier import Client, TrainingProgress
from atelier.v1 import generation_pb2, generation_pb2_grpc
from atelier_server import pocket
from benchmarks import servers
from benchmarks.harness import Row, row
from benchmarks.plain_training import LEARNING_RATE, PROMPT, RANK, RESOLUTION
from benchmarks.serving import serving
from benchmarks.training_many import PICTURES

_IMAGES = 8
_STEPS = 500  # of a request: more than there is time for
_TRAINING_STEPS = 20_000  # the same of a training
_STARTED = 3  # steps before a measurement begins


class Steps:
    """When each step was done: (seconds, how many steps by then)."""

    def __init__(self) -> None:
        self._told: list[tuple[float, float]] = []
        self._changed = threading.Condition()
        self.error: BaseException | None = None

    def tell(self, steps: float) -> None:
        with self._changed:
            self._told.append((perf_counter(), steps))
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def wait(self) -> None:
        """Until it goes."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.error or len(self._told) >= _STARTED, timeout=300):
                raise TimeoutError("no step was told in five minutes")
        if self.error:
            raise self.error

    def done(self, begin: float, end: float) -> float:
        """Steps within the time."""
        if self.error:
            raise self.error

        def by(time: float) -> float:
            return max((steps for told, steps in self._told if told <= time), default=0.0)

        return by(end) - by(begin)

    def intervals(self, begin: float, end: float) -> list[float]:
        """Seconds between one step and the next; one that begins within the time is waited for."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.error or self._told[-1][0] > end, timeout=300):
                raise TimeoutError("no step was told in five minutes")
        if self.error:
            raise self.error
        times = [told for told, _ in self._told if told >= begin]
        return [after - before for before, after in pairwise(times) if before <= end]


Work = Callable[[], AbstractContextManager[Steps]]


@dataclass
class _Side:
    """What a pair measures of one side."""

    sums: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)

    def measure(self, paint: Work, train: Work, seconds: float) -> None:
        with paint() as painted:
            begin, end = _window(seconds, painted)
            paint_rate, alone = painted.done(begin, end) / seconds, painted.intervals(begin, end)
        with train() as learned:
            train_rate = learned.done(*_window(seconds, learned)) / seconds
        with paint() as painted, train() as learned:
            begin, end = _window(seconds, painted, learned)
            shares = (painted.done(begin, end) / paint_rate, learned.done(begin, end) / train_rate)
            together = painted.intervals(begin, end)
        self.sums.append(sum(shares) / seconds)
        self.alone.append(_p95(alone))
        self.together.append(_p95(together))
        self.longest.append(max(together, default=nan))


def run(*, quick: bool) -> list[Row]:
    seconds, pairs = (4.0, 1) if quick else (20.0, 3)
    base = pocket.path()
    mine, theirs = _Side(), _Side()
    options = ("--metrics-port", "-1", "--limits.max-inference-steps", str(_STEPS))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with (
            serving(root / "data", *options, model=base) as server,
            servers.diffusers(base, []) as peer_address,
        ):
            names = count()
            measures: list[Callable[[], None]] = [
                lambda: mine.measure(
                    lambda: _painting(server.address, _IMAGES),
                    lambda: _training(server.address, f"subject{next(names)}"),
                    seconds,
                ),
                lambda: theirs.measure(
                    lambda: _painting(peer_address, 1),
                    lambda: _plain_training(base, root / "plain.safetensors"),
                    seconds,
                ),
            ]
            for pair in range(pairs):
                for measure in measures if pair % 2 == 0 else reversed(measures):
                    measure()

    def target(bound: str) -> str | None:
        return None if quick else bound

    def ratio(ours: float, peer: float) -> float:
        return ours / peer

    p95 = "p95 between two denoise steps, with and without a training"
    sums = {"ours": mine.sums, "peer": theirs.sums}
    return [
        row("shares of painting and training", "sum", sums, target(">= 0.9"), ratio=lambda ours, _: ours),
        row("the same against two processes", "sum", sums, target(">= 1"), ratio=ratio),
        row(f"{p95}: ours", "s", {"ours": mine.together, "peer": mine.alone}, target("<= 1.3"), ratio=ratio),
        row(f"{p95}: two processes", "s", {"ours": theirs.together, "peer": theirs.alone}, None, ratio=ratio),
        row(
            "the longest such pause, against two processes",
            "s",
            {"ours": mine.longest, "peer": theirs.longest},
            None,
            ratio=ratio,
        ),
    ]


def _window(seconds: float, *running: Steps) -> tuple[float, float]:
    """A time in which all of these run."""
    for steps in running:
        steps.wait()
    begin = perf_counter()
    sleep(seconds)
    return begin, begin + seconds


def _p95(intervals: list[float]) -> float:
    """Not a number in a smoke run that saw no steps."""
    return quantiles(intervals, n=20, method="inclusive")[-1] if len(intervals) > 1 else nan


@contextmanager
def _painting(address: str, counted: int) -> Iterator[Steps]:
    """Eight guided pictures, until the end of the block; the server counts `counted` for one of its steps."""
    steps = Steps()
    request = generation_pb2.GenerateRequest(
        prompt=PROMPT,
        seed=1,
        num_images=_IMAGES,
        num_inference_steps=_STEPS,
        guidance_scale=5.0,
        scheduler="ddim",
        width=64,
        height=64,
    )
    with grpc.insecure_channel(address) as channel:
        stream = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request)

        def follow() -> None:
            try:
                for message in stream:
                    if message.HasField("progress"):
                        steps.tell(message.progress.step / counted)
            except grpc.RpcError as error:
                steps.fail(error)

        reader = threading.Thread(target=follow)
        reader.start()
        try:
            yield steps
        finally:
            steps.error = None
            stream.cancel()
            reader.join()


@contextmanager
def _training(address: str, name: str) -> Iterator[Steps]:
    """A training in our server, cancelled at the end of the block."""
    steps = Steps()
    training = ""

    def follow() -> None:
        nonlocal training
        try:
            with Client(address) as client:
                for event in client.train(
                    name,
                    folder=PICTURES,
                    instance_prompt=PROMPT,
                    max_train_steps=_TRAINING_STEPS,
                    checkpointing_steps=_TRAINING_STEPS,
                    train_batch_size=1,
                    rank=RANK,
                    learning_rate=LEARNING_RATE,
                    resolution=RESOLUTION,
                ):
                    training = event.training
                    if isinstance(event, TrainingProgress):
                        steps.tell(event.step)
        except Exception as error:
            steps.fail(error)

    reader = threading.Thread(target=follow)
    reader.start()
    try:
        yield steps
    finally:
        with Client(address) as client:
            client.cancel_training(training)
        reader.join()


@contextmanager
def _plain_training(base: Path, file: Path) -> Iterator[Steps]:
    """The script, ended with the block."""
    steps = Steps()
    command = [sys.executable, "-m", "benchmarks.plain_training", str(base), str(PICTURES), str(file)]
    process = subprocess.Popen([*command, str(_TRAINING_STEPS)], stdout=subprocess.PIPE, text=True)
    output = process.stdout
    assert output is not None

    def follow() -> None:
        for line in output:
            steps.tell(int(line))

    reader = threading.Thread(target=follow)
    reader.start()
    try:
        yield steps
    finally:
        process.terminate()
        process.wait(timeout=60)
        reader.join()
