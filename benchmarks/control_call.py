"""Control calls while pictures are painted: our front against a server that paints in its own process.

Other clients, in a process of their own, ask for pictures with an adapter each. Three calls are measured:

GetServerInfo needs nothing of the pipeline. A peer that paints in a thread answers it whenever the painting
lets go of Python's lock; our front is a process of its own. That is for machines with more than one core, so
both servers, their clients and this program share all that there are; each server paints with one thread.

LoadAdapter needs the pipeline: diffusers' load_lora_weights changes the very modules that a forward runs
through, so the peer lets the picture in hand end first (never those that wait: control calls go before
them). We fill a slot between two steps. The adapter is one that the server knows and has unloaded, untimed, a
moment before: the peer reads its file again, ours is in host memory.

ImportAdapter is the same with a file that the server has never seen, under a new name, deleted afterwards.
Either server answers when the next picture may have the adapter; for ours that includes that the file is
checked, tried, hashed and stored for good. No picture decides the moment of a call.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter, sleep

import grpc

from atelier.codec import AdapterImport
from atelier.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2_grpc, server_pb2, server_pb2_grpc
from benchmarks import servers
from benchmarks.bases import random_adapters, sd1_shaped
from benchmarks.harness import Row, interleave, row

_PAUSE_SECONDS = 0.005
_CHANGE_PAUSE_SECONDS = 1.0  # at most, and longer than the peer takes for a picture
_STREAMS = 8
_STEPS = 20


def run(*, quick: bool) -> list[Row]:
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    reads, read_rounds = (20, 1) if quick else (400, 7)
    loads, load_rounds = (3, 1) if quick else (40, 3)
    imports, import_rounds = (3, 1) if quick else (20, 3)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = sd1_shaped(root / "base")
        count = _STREAMS + 2 + imports * (1 + import_rounds)  # to load, to try, and a warm-up round
        files = random_adapters(root / "files", base, count=count, rank=16)
        known, fresh = files[: _STREAMS + 1], files[_STREAMS + 1 :]
        *names, loaded = [file.stem for file in known]
        with (
            servers.diffusers(base, known) as theirs,
            servers.ours(base, root / "data", known) as mine,
        ):
            for address in (mine, theirs):
                _try(address, fresh[0])
            to_us, to_them = iter(fresh[1:]), iter(fresh[1:])
            read = interleave(
                lambda: _p99_of_reads(mine, names, reads),
                lambda: _p99_of_reads(theirs, names, reads),
                read_rounds,
            )
            load = interleave(
                lambda: _p99_of_loads(mine, names, loaded, loads),
                lambda: _p99_of_loads(theirs, names, loaded, loads),
                load_rounds,
            )
            imported = interleave(
                lambda: _p99_of_imports(mine, names, to_us, imports),
                lambda: _p99_of_imports(theirs, names, to_them, imports),
                import_rounds,
            )
    target = None if quick else ">= 5"
    return [
        row("p99 of GetServerInfo while generating", "s", read, target, ratio=_ratio),
        row("p99 of LoadAdapter while generating", "s", load, target, ratio=_ratio),
        row("p99 of ImportAdapter while generating", "s", imported, target, ratio=_ratio),
    ]


def _ratio(ours: float, peer: float) -> float:
    return peer / ours


def _p99_of_reads(address: str, names: Sequence[str], calls: int) -> float:
    """Seconds, over so many calls one after another, while the other clients keep the server painting."""
    taken = []
    with servers.painting(address, names, steps=_STEPS), grpc.insecure_channel(address) as channel:
        stub = server_pb2_grpc.ServerServiceStub(channel)
        stub.GetServerInfo(server_pb2.GetServerInfoRequest())  # connects
        for _ in range(calls):
            before = perf_counter()
            stub.GetServerInfo(server_pb2.GetServerInfoRequest())
            taken.append(perf_counter() - before)
            sleep(_PAUSE_SECONDS)
    return _p99(taken)


def _p99_of_loads(address: str, names: Sequence[str], loaded: str, calls: int) -> float:
    """Seconds, likewise, each after the adapter has been unloaded, which is not timed."""
    taken = []
    moments = random.Random(0)
    with servers.painting(address, names, steps=_STEPS), grpc.insecure_channel(address) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        for _ in range(calls):
            stub.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(adapter=loaded))  # connects, the first time
            sleep(moments.uniform(0, _CHANGE_PAUSE_SECONDS))
            before = perf_counter()
            stub.LoadAdapter(adapter_pb2.LoadAdapterRequest(adapter=loaded))
            taken.append(perf_counter() - before)
    return _p99(taken)


def _p99_of_imports(address: str, names: Sequence[str], files: Iterator[Path], calls: int) -> float:
    """Seconds, likewise, each with the next of these files; what is deleted afterwards is not timed."""
    taken = []
    moments = random.Random(0)
    with servers.painting(address, names, steps=_STEPS), grpc.insecure_channel(address) as channel:
        server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(
            server_pb2.GetServerInfoRequest()
        )  # connects
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        for _ in range(calls):
            requests, name = _upload(next(files))
            sleep(moments.uniform(0, _CHANGE_PAUSE_SECONDS))
            before = perf_counter()
            stub.ImportAdapter(iter(requests))
            taken.append(perf_counter() - before)
            stub.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(adapter=name))
    return _p99(taken)


def _p99(taken: Sequence[float]) -> float:
    return statistics.quantiles(taken, n=100, method="inclusive")[-1]


def _upload(file: Path) -> tuple[list[adapter_pb2.ImportAdapterRequest], str]:
    """The messages, made before the clock runs, and the name that the adapter gets."""
    return list(AdapterImport(file, file.stem, {}).requests()), file.stem


def _try(address: str, file: Path) -> None:
    """What is imported can be painted with."""
    with grpc.insecure_channel(address) as channel:
        requests, name = _upload(file)
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        stub.ImportAdapter(iter(requests))
        events = list(
            generation_pb2_grpc.GenerationServiceStub(channel).Generate(
                servers.picture(name, seed=0, steps=_STEPS)
            )
        )
        assert any(event.HasField("image") for event in events), f"no picture with {name}"
        stub.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(adapter=name))
