"""What an error tells the front: the reason for a user, the rest for the log."""

from __future__ import annotations

import logging
from collections.abc import Callable

from atelier_server.engine.runner import Runner
from atelier_server.errors import AtelierError, InvalidRequest, OutOfMemory
from atelier_server.messages import CallFailed, Event, JobFailed, Sample
from atelier_server.origin import Origin

_log = logging.getLogger(__name__)


class Failures:
    """`origin` tells where a job comes from, for the log."""

    def __init__(
        self, runner: Runner, send: Callable[[Event], None], origin: Callable[[str], Origin]
    ) -> None:
        self._runner = runner
        self._send = send
        self._origin = origin

    def of(self, job_id: str, error: Exception) -> JobFailed:
        if isinstance(error, AtelierError):
            violations = error.violations if isinstance(error, InvalidRequest) else ()
            return JobFailed(job_id, error.reason, error.message, tuple(error.metadata.items()), violations)
        about = {"job": job_id, "request_id": self._origin(job_id).request_id}
        _log.error("a job failed", exc_info=error, extra={k: v for k, v in about.items() if v})
        return JobFailed(job_id, "INTERNAL", "an internal error; the server's log has the details")

    def of_training(self, training_id: str, error: Exception) -> JobFailed:
        return self.of(training_id, self.out_of_memory(error, "train") or error)

    def of_call(self, call_id: str, error: Exception) -> CallFailed:
        failure = self.of("", self.out_of_memory(error, "generate") or error)
        return CallFailed(call_id, failure.reason, failure.message, failure.metadata, failure.violations)

    def out_of_memory(self, error: Exception, phase: str) -> OutOfMemory | None:
        """What to tell users if that was the error; what torch had cached is free again."""
        memory = self._runner.out_of_memory(error)
        if memory is not None:
            _log.warning("out of memory (%s): %s", phase, memory.message)
            self._send(Sample("out_of_memory_total", 1.0, (phase,)))
        return memory
