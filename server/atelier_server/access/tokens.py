"""The tokens file: which tokens are whose, by their digests, and what a tenant may have.

    [[token]]                        # printed by `atelier token new red`
    tenant = "red"
    sha256 = "9f86d081884c7d65..."   # of the token; the token itself is in no file of the server
    expires = 2027-01-01T00:00:00Z   # optional
    note = "the nightly build"       # optional, for people

    [tenant.red]                     # optional: other quotas than the settings'
    max_images = 32

It is read again when it has changed. A file that has become wrong is told in the log, and the last good one
stays in force.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import tomllib
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, Strict, StringConstraints, ValidationError

from atelier_server.access.tenants import TENANT_NAME, Tenant
from atelier_server.config import Quotas
from atelier_server.errors import StartError, TokenExpired, Unauthenticated

# What `atelier token new` makes has 47 characters; a token that a person thought up is refused below this.
SHORTEST_TOKEN = 32
_log = logging.getLogger(__name__)
_Name = Annotated[str, StringConstraints(pattern=f"^{TENANT_NAME.pattern}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: _Name
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    # Strict: else a time without a zone, at midnight, would pass for a date.
    expires: AwareDatetime | Annotated[date, Strict()] | None = None
    note: str = ""

    def expired(self, now: datetime) -> bool:
        end = self.expires
        if end is not None and not isinstance(end, datetime):
            end = datetime(end.year, end.month, end.day, tzinfo=UTC)
        return end is not None and now >= end


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    token: tuple[_Entry, ...] = ()
    tenant: dict[_Name, dict[str, Any]] = Field(default_factory=dict)


class Tokens:
    """Raises StartError for a file that is wrong from the start. `defaults` are every tenant's quotas."""

    def __init__(self, path: Path, defaults: Quotas) -> None:
        self._path = path
        self._defaults = defaults
        self._stamp = self._look()
        self._entries, self._tenants = self._read()

    def holder(self, token: str) -> Tenant:
        """Whose token it is. Raises Unauthenticated, TokenExpired."""
        self._reload()
        digest = hashlib.sha256(token.encode()).hexdigest()
        found: _Entry | None = None
        # All of them, whatever is found: the time tells nothing.
        for entry in self._entries:
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        if found is None or len(token) < SHORTEST_TOKEN:
            raise Unauthenticated("the token is not known here")
        if found.expired(datetime.now(UTC)):
            raise TokenExpired("the token has expired")
        return self.tenant(found.tenant)

    def tenant(self, name: str) -> Tenant:
        """That tenant with its quotas."""
        return self._tenants.get(name) or Tenant(name, self._defaults)

    # --------------------------------------------------------------------------------------------- file
    def _look(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _reload(self) -> None:
        if (stamp := self._look()) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._entries, self._tenants = self._read()
        except StartError as error:
            _log.error("the tokens file was not read again, the last good one stays in force: %s", error)
        else:
            _log.info("the tokens file was read again: %d tokens", len(self._entries))

    def _read(self) -> tuple[tuple[_Entry, ...], Mapping[str, Tenant]]:
        where = f"--tokens-file: {self._path}"
        try:
            content = _Content.model_validate(tomllib.loads(self._path.read_text(encoding="utf-8")))
            tenants = {
                name: Tenant(name, Quotas.model_validate({**self._defaults.model_dump(), **quotas}))
                for name, quotas in content.tenant.items()
            }
        except OSError as error:
            raise StartError(f"{where} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            # Never the input: somebody may have written a token where its digest belongs.
            told = [(".".join(str(part) for part in item["loc"]), item["msg"]) for item in error.errors()]
            raise StartError(*(f"{where}: {place}: {text}" for place, text in told)) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            raise StartError(f"{where} is not TOML") from None
        return content.token, tenants
