"""Tenants, and the names of their things.

Inside the server a tenant's adapter `otto` is `red/otto`, and so are its trainings and request ids; the door
adds the scope on the way in and takes it off on the way out. The tenant `default` has no scope: it is
everybody while no identity is asked for, and whoever holds its token afterwards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from atelier_server.config import Quotas
from atelier_server.core import ADAPTER_NAME

TENANT_NAME = ADAPTER_NAME
DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Scope:
    """`tenant` is "" for the default tenant."""

    tenant: str = ""

    @property
    def prefix(self) -> str:
        return f"{self.tenant}/" if self.tenant else ""

    def enter(self, name: str) -> str:
        """A name as a user of this scope writes it, to what it is inside. "" stays ""."""
        return self.prefix + name if name else name

    def owns(self, name: str) -> bool:
        """Whether a name from inside belongs to this scope."""
        owner, slash, _ = name.rpartition("/")
        return owner == self.tenant and bool(slash) == bool(self.tenant)

    def leave(self, text: str) -> str:
        """A text from inside as a user of this scope is to read it: every name of the scope without it."""
        if not self.tenant or self.prefix not in text:
            return text
        return re.sub(rf"(?<![a-z0-9/-]){re.escape(self.prefix)}", "", text)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose a call is, and how much it may have."""

    name: str = DEFAULT_TENANT
    quotas: Quotas = field(default_factory=Quotas)

    @property
    def scope(self) -> Scope:
        return Scope("" if self.name == DEFAULT_TENANT else self.name)
