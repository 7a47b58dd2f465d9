"""Around every call: its id, its duration, whose it is, and its errors as statuses."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing, nullcontext, suppress
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from atelier_server import origin
from atelier_server.access.identity import Identity
from atelier_server.errors import AtelierError, InvalidRequest, SlowConsumer
from atelier_server.metrics import Metrics
from atelier_server.rpc import caller, outward, status
from atelier_server.rpc.admission import Admission
from atelier_server.rpc.receive import heard_out
from atelier_server.traces import Tracer

REQUEST_ID = "x-request-id"
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OURS = "/atelier.v1."
# Probes and balancers have no tokens. Everything else, reflection too, is for those who have one.
_FOR_ALL = "/grpc.health.v1.Health/"
_PATIENCE_SECONDS = 1.0
_log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Leaves health alone: its errors are its own."""

    def __init__(
        self,
        metrics: Metrics,
        tracer: Tracer,
        identity: Identity,
        admission: Admission,
        *,
        slow_reader_seconds: float,
    ) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._identity = identity
        self._admission = admission
        self._slow_reader_seconds = slow_reader_seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_FOR_ALL):
            return handler
        inner: Callable[..., Any] = _behaviour(handler)
        hearing = heard_out if handler.request_streaming else nullcontext

        async def unary(request: Any, context: Context) -> Any:
            async with _Call(method, context, self._metrics, self._tracer), hearing(request):
                tenant = await caller.identify(self._identity, context)
                with self._admission.enter(method, tenant.name):
                    answer = await inner(request, context)
                outward.strip(answer, caller.scope())
                return answer

        # It writes instead of yielding: so it knows how long nobody has read.
        async def stream(request: Any, context: Context) -> None:
            async with _Call(method, context, self._metrics, self._tracer), hearing(request):
                tenant = await caller.identify(self._identity, context)
                with self._admission.enter(method, tenant.name):
                    async with aclosing(inner(request, context)) as answers:
                        async for answer in answers:
                            outward.strip(answer, caller.scope())
                            await self._write(context, answer)

        build: Callable[..., Any] = _BUILDERS[
            bool(handler.request_streaming), bool(handler.response_streaming)
        ]
        return build(  # type: ignore[no-any-return]
            stream if handler.response_streaming else unary,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    async def _write(self, context: Context, answer: Any) -> None:
        """Waits for flow control, not for ever. Raises SlowConsumer."""
        try:
            async with asyncio.timeout(self._slow_reader_seconds):
                await context.write(answer)
        except TimeoutError:
            seconds = self._slow_reader_seconds
            raise SlowConsumer(f"nothing of this stream was read for {seconds:g} s") from None
        except (grpc.aio.UsageError, grpc.aio.InternalError) as error:
            # The call has ended under us: its client has gone.
            raise asyncio.CancelledError from error


_BUILDERS: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _behaviour(handler: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    return found


def on_end(context: Context, action: Callable[[], None]) -> None:
    """Calls `action` when the call is over, however it ended."""
    # gRPC's context and its callbacks hold each other until the garbage is collected, which may be many
    # pictures later: what `action` holds is let go once it is done.
    due = [action]

    def ended(_: Context) -> None:
        while due:
            due.pop()()

    context.add_done_callback(ended)  # type: ignore[arg-type]


def _name(method: str) -> str:
    """Generate, of /atelier.v1.GenerationService/Generate."""
    return method.rpartition("/")[2]


class _Call:
    """One call, from its first line to its status."""

    def __init__(self, method: str, context: Context, metrics: Metrics, tracer: Tracer) -> None:
        self._method = method
        self._context = context
        self._metrics = metrics
        self._begin = time.perf_counter()
        metadata = {
            key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
        }
        given = metadata.get(REQUEST_ID, "")
        self._id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        self._trace = tracer.begin(method, metadata, self._id)

    async def __aenter__(self) -> None:
        origin.set_current(self._trace.origin)
        name = _name(self._method)
        self._metrics.call_began(name)
        on_end(self._context, lambda: self._metrics.call_left(name))
        self._context.set_trailing_metadata(((REQUEST_ID, self._id),))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._ended("OK")
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            remaining = self._context.time_remaining()
            late = remaining is not None and remaining <= 0
            self._ended("DEADLINE_EXCEEDED" if late else "CANCELLED")
        else:
            refusal = status.known(error, f"{self._method} ({REQUEST_ID} {self._id})")
            self._ended(refusal.status, refusal)
            await self._abort(refusal)

    async def _abort(self, refusal: AtelierError) -> None:
        message, metadata = status.trailers(refusal, caller.scope())
        trailers = (*metadata, (REQUEST_ID, self._id))
        # A status follows what was sent before it: whoever does not read gets it with the rest, when they do.
        patience = _PATIENCE_SECONDS if isinstance(refusal, SlowConsumer) else None
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._context.abort(status.code_of(refusal), message, trailers)

    def _ended(self, code: str, refusal: AtelierError | None = None) -> None:
        seconds = time.perf_counter() - self._begin
        name = _name(self._method)
        self._metrics.call_ended(name, code, seconds)
        self._trace.end(code)
        about = {"request_id": self._id, "method": name, "code": code, "seconds": round(seconds, 4)}
        if (tenant := caller.identified()) is not None:
            about["tenant"] = tenant.name
        if refusal is not None:
            about["reason"] = refusal.reason
            # The message may quote what the user wrote.
            _log.debug("%s", refusal.message, extra=about)
        if isinstance(refusal, InvalidRequest) and refusal.violations:
            about["fields"] = ",".join(violation.field[:60] for violation in refusal.violations[:10])
        _log.info("call ended", extra=about)
