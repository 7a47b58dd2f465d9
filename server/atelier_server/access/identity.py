"""From what a call shows to whose it is. An identity provider joins as one more `Authenticator`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from atelier_server.access.tenants import TENANT_NAME, Tenant
from atelier_server.access.tokens import Tokens
from atelier_server.config import Quotas
from atelier_server.errors import Unauthenticated


@dataclass(frozen=True, slots=True)
class Shown:
    """What a call shows of who makes it: its bearer token, the names in its client certificate."""

    token: str | None = None
    certificate_names: tuple[str, ...] = ()


class Authenticator(Protocol):
    """One way to know whose a call is."""

    async def tenant(self, shown: Shown) -> Tenant | None:
        """Whose call it is; None where nothing was shown that this way understands.

        Raises Unauthenticated where something was shown, and it is wrong.
        """


class ByToken:
    """A bearer token that the tokens file knows."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def tenant(self, shown: Shown) -> Tenant | None:
        return None if shown.token is None else self._tokens.holder(shown.token)


class ByCertificate:
    """A client certificate: its first alternative name that can be a tenant's, else its common name.

    Whether the certificate is good was decided in the TLS handshake.
    """

    def __init__(self, tokens: Tokens | None, defaults: Quotas) -> None:
        self._tokens = tokens
        self._defaults = defaults

    async def tenant(self, shown: Shown) -> Tenant | None:
        if not shown.certificate_names:
            return None
        for name in shown.certificate_names:
            if TENANT_NAME.fullmatch(name):
                return self._tokens.tenant(name) if self._tokens else Tenant(name, self._defaults)
        raise Unauthenticated("the client certificate names no tenant, neither as alternative name nor as CN")


class Anybody:
    """No identity is asked for: everybody is the default tenant."""

    def __init__(self, quotas: Quotas) -> None:
        self._tenant = Tenant(quotas=quotas)

    async def tenant(self, shown: Shown) -> Tenant | None:  # noqa: ARG002 -- whatever is shown
        return self._tenant


class Identity:
    """Asks one way after another; a token goes before a certificate, which a mesh may add by itself."""

    def __init__(self, ways: Sequence[Authenticator]) -> None:
        self._ways = tuple(ways)

    async def tenant(self, shown: Shown) -> Tenant:
        """Raises Unauthenticated."""
        for way in self._ways:
            if (tenant := await way.tenant(shown)) is not None:
                return tenant
        raise Unauthenticated("this server asks for a token: metadata `authorization: Bearer TOKEN`")


def identity_of(tokens: Tokens | None, quotas: Quotas, *, certificates: bool) -> Identity:
    """What the settings ask for."""
    ways: list[Authenticator] = []
    if tokens is not None:
        ways.append(ByToken(tokens))
    if certificates:
        ways.append(ByCertificate(tokens, quotas))
    return Identity(ways or [Anybody(quotas)])
