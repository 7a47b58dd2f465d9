"""Who is calling: found at the door, known for the length of the call."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import grpc.aio

from atelier_server.access.identity import Identity, Shown
from atelier_server.access.tenants import Scope, Tenant
from atelier_server.errors import Unauthenticated

# Every call is a task of its own, with a context of its own: nothing has to be put back.
_TENANT: ContextVar[Tenant] = ContextVar("tenant")
_SCHEME = "bearer "


def tenant() -> Tenant:
    """Whose call this is; the default tenant outside of calls."""
    return _TENANT.get(Tenant())


def identified() -> Tenant | None:
    """Whose call this is; None for one that nobody has been found for."""
    return _TENANT.get(None)


def scope() -> Scope:
    """The scope of the names that this call reads and writes."""
    return tenant().scope


async def identify(identity: Identity, context: grpc.aio.ServicerContext[Any, Any]) -> Tenant:
    """Whose the call is, from now on to its end. Raises Unauthenticated."""
    found = await identity.tenant(_shown(context))
    _TENANT.set(found)
    return found


def _shown(context: grpc.aio.ServicerContext[Any, Any]) -> Shown:
    given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if len(given) > 1:
        raise Unauthenticated("metadata `authorization` was sent more than once")
    return Shown(_token(str(given[0])) if given else None, _certificate_names(context))


def _token(header: str) -> str:
    if not header[: len(_SCHEME)].lower() == _SCHEME:
        raise Unauthenticated("metadata `authorization` is not `Bearer TOKEN`")
    return header[len(_SCHEME) :].strip()


def _certificate_names(context: grpc.aio.ServicerContext[Any, Any]) -> tuple[str, ...]:
    """The alternative names, then the common name, of a certificate that the handshake has verified."""
    shown = context.auth_context()
    names = [*shown.get("x509_subject_alternative_name", ()), *shown.get("x509_common_name", ())]
    return tuple(name.decode(errors="replace") for name in names)
