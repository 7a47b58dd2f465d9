"""The handle on a worker process."""

from __future__ import annotations

import sys

from atelier_server.messages import Cancel, JobCancelled, WorkerLost, WorkerSettings
from atelier_server.workers.handle import LocalWorker

SETTINGS = WorkerSettings("m", "cpu", "auto", "d", 1, 3, 1, 0)
ECHO = """
import os, socket, sys
from atelier_server.workers import wire
from atelier_server.messages import JobCancelled
stream = socket.socket(fileno=int(sys.argv[1])).makefile("rwb")
settings = wire.read(stream)
set_ = os.environ
facts = (settings.model, *(set_[n] for n in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX")))
stream.write(wire.frame(JobCancelled(repr(facts))))
stream.flush()
try:
    while True:
        stream.write(wire.frame(JobCancelled(wire.read(stream).job_id)))
        stream.flush()
except EOFError:
    sys.exit(7)
"""
NONSENSE = """
import socket, sys
end = socket.socket(fileno=int(sys.argv[1]))
end.send(bytes(7) + b"\\1x")
end.recv(10**6)
"""


def worker(script: str = ECHO) -> LocalWorker:
    return LocalWorker(SETTINGS, (sys.executable, "-c", script))


async def test_settings_go_down_first_and_events_come_up() -> None:
    handle = worker()
    await handle.start()
    events = handle.events()
    assert await anext(events) == JobCancelled("('m', 'PASSIVE', '3', '2')")
    handle.send(Cancel("x" * 10**6))
    assert await anext(events) == JobCancelled("x" * 10**6)
    handle.kill()
    assert await anext(events) == WorkerLost(-9)
    assert handle.pid is None
    handle.send(Cancel("dropped"))
    await handle.start()
    assert isinstance(await anext(handle.events()), JobCancelled)
    await handle.stop()
    await handle.stop()


async def test_a_process_that_ends_or_speaks_nonsense_is_lost() -> None:
    for script, code in (("import sys; sys.exit(3)", 3), ("raise SystemExit(0)", 0)):
        handle = worker(script)
        await handle.start()
        assert [event async for event in handle.events()] == [WorkerLost(code)]
    handle = worker(NONSENSE)
    await handle.start()
    (lost,) = [event async for event in handle.events()]
    assert isinstance(lost, WorkerLost)
