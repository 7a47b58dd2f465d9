"""Four trainings at once in a running server, against four runs of a plain diffusers + PEFT loop.

The runs come one after another, and then as four processes at once. All sides have one core. Ours is timed
from the first Train call to the last `completed`; the server runs already, as it does for the pictures it
paints. A run of the peer is timed from the start of its process to its saved file, which is what its user
waits for; a control row leaves its starts out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from atelier import Client, TrainingCompleted, TrainingState
from benchmarks.bases import sd1_shaped
from benchmarks.harness import Row, row
from benchmarks.plain_training import LEARNING_RATE, PROMPT, RANK, RESOLUTION
from benchmarks.serving import Serving, serving

PICTURES = Path(__file__).parents[1] / "examples" / "otto"
_MANY = 4
_LOOK_SECONDS = 0.5
_MIB = 2**20


@dataclass
class _Samples:
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def both(self) -> dict[str, list[float]]:
        return {"ours": self.ours, "peer": self.peer}


def run(*, quick: bool) -> list[Row]:
    steps, pairs = (2, 1) if quick else (100, 3)
    one_by_one, steps_alone, at_once, resident, shared = (_Samples() for _ in range(5))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = sd1_shaped(root / "base")
        peer = _Peer(base, root, steps)
        with serving(root / "data", "--metrics-port", "-1", model=base) as server:
            mine = _Ours(server, steps)
            mine.train()
            for pair in range(pairs):
                turns: list[Callable[[], None]] = [
                    lambda: _ours(mine, (one_by_one, steps_alone, at_once), resident, shared),
                    lambda: _sequential(peer, one_by_one, steps_alone),
                    lambda: _processes(peer, at_once, resident, shared),
                ]
                for turn in turns if pair % 2 == 0 else reversed(turns):
                    turn()
    many = f"{_MANY} trainings of {steps} steps"

    def target(bound: str) -> str | None:
        return None if quick else bound

    def faster(ours: float, theirs: float) -> float:
        return theirs / ours

    def share(ours: float, theirs: float) -> float:
        return ours / theirs

    return [
        row(f"{many}, runs one after another", "s", one_by_one.both(), target(">= 2.5"), ratio=faster),
        row("the same, without the starts of the runs", "s", steps_alone.both(), None, ratio=faster),
        row(f"{many}, {_MANY} processes at once", "s", at_once.both(), None, ratio=faster),
        row(
            f"resident memory, {_MANY} processes at once",
            "MiB",
            resident.both(),
            target("<= 0.5"),
            ratio=share,
        ),
        row("the same, shared pages counted once", "MiB", shared.both(), None, ratio=share),
    ]


def _ours(mine: _Ours, times: Sequence[_Samples], resident: _Samples, shared: _Samples) -> None:
    with _watched([mine.server.pid, mine.server.worker_pid]) as memory:
        seconds = mine.train()
    for samples in times:
        samples.ours.append(seconds)
    resident.ours.append(memory.resident)
    shared.ours.append(memory.shared)


def _sequential(peer: _Peer, one_by_one: _Samples, steps_alone: _Samples) -> None:
    before = perf_counter()
    steps_alone.peer.append(sum(peer.wait(peer.start(number)) for number in range(_MANY)))
    one_by_one.peer.append(perf_counter() - before)


def _processes(peer: _Peer, at_once: _Samples, resident: _Samples, shared: _Samples) -> None:
    before = perf_counter()
    processes = [peer.start(number) for number in range(_MANY)]
    with _watched([process.pid for process in processes]) as memory, ThreadPoolExecutor(_MANY) as pool:
        list(pool.map(peer.wait, processes))
    at_once.peer.append(perf_counter() - before)
    resident.peer.append(memory.resident)
    shared.peer.append(memory.shared)


@dataclass
class _Ours:
    server: Serving
    steps: int
    _rounds: int = 0

    def train(self) -> float:
        """Seconds until all are completed."""
        self._rounds += 1
        before = perf_counter()
        with ThreadPoolExecutor(_MANY) as pool:
            list(pool.map(self._one, range(_MANY)))
        return perf_counter() - before

    def _one(self, number: int) -> None:
        with Client(self.server.address) as client:
            *_, last = client.train(
                f"subject{number}-{self._rounds}",
                folder=PICTURES,
                instance_prompt=PROMPT,
                max_train_steps=self.steps,
                checkpointing_steps=self.steps,
                train_batch_size=1,
                batch_bucket=_MANY,
                rank=RANK,
                learning_rate=LEARNING_RATE,
                resolution=RESOLUTION,
                seed=number,
            )
        if not isinstance(last, TrainingCompleted) or last.state is not TrainingState.SUCCEEDED:
            raise RuntimeError(f"the training ended with {last}")


@dataclass(frozen=True)
class _Peer:
    base: Path
    root: Path
    steps: int

    def start(self, number: int) -> subprocess.Popen[str]:
        file = self.root / f"plain{number}.safetensors"
        command = [sys.executable, "-m", "benchmarks.plain_training", str(self.base), str(PICTURES)]
        return subprocess.Popen([*command, str(file), str(self.steps)], stdout=subprocess.PIPE, text=True)

    def wait(self, process: subprocess.Popen[str]) -> float:
        """Waits for its end; seconds of its steps, the first of them reckoned as long as the others."""
        assert process.stdout is not None
        told = [perf_counter() for _ in process.stdout]
        if process.wait() or len(told) != self.steps:
            raise RuntimeError(f"the plain training ended with {process.returncode} after {len(told)} steps")
        return (told[-1] - told[0]) * self.steps / (self.steps - 1)


@dataclass
class _Memory:
    """MiB at their peak: of each process, and with pages of several processes shared out among them."""

    resident: float = 0.0
    shared: float = 0.0


@contextmanager
def _watched(pids: Sequence[int]) -> Iterator[_Memory]:
    """The most that these processes take together."""
    memory, done = _Memory(), threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_SECONDS):
            memory.resident = max(memory.resident, sum(_rollup(pid, "Rss") for pid in pids))
            memory.shared = max(memory.shared, sum(_rollup(pid, "Pss") for pid in pids))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()


def _rollup(pid: int, entry: str) -> float:
    """MiB; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / _MIB for line in lines if line.startswith(f"{entry}:")), 0.0)
