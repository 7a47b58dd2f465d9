"""From what a call shows to whose it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier_server.access.identity import Identity, Shown, identity_of
from atelier_server.access.tokens import Tokens
from atelier_server.config import Quotas
from atelier_server.errors import Unauthenticated
from tests.unit.access.test_tokens import RED, entry

QUOTAS = Quotas(max_images=7)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    (tmp_path / "tokens.toml").write_text(entry("red", RED) + "[tenant.blue]\nmax_images = 1\n")
    return Tokens(tmp_path / "tokens.toml", QUOTAS)


async def test_without_tokens_and_certificates_everybody_is_the_default_tenant() -> None:
    identity = identity_of(None, QUOTAS, certificates=False)
    for shown in (Shown(), Shown("whatever"), Shown(certificate_names=("red",))):
        tenant = await identity.tenant(shown)
        assert (tenant.name, tenant.quotas, tenant.scope.tenant) == ("default", QUOTAS, "")


async def test_with_tokens_a_token_is_needed(tokens: Tokens) -> None:
    identity = identity_of(tokens, QUOTAS, certificates=False)
    assert (await identity.tenant(Shown(RED))).name == "red"
    await refused(identity, Shown(), "asks for a token")
    await refused(identity, Shown(""), "not known")
    await refused(identity, Shown(certificate_names=("red",)), "asks for a token")


async def test_a_certificate_names_the_tenant() -> None:
    identity = identity_of(None, QUOTAS, certificates=True)
    assert (await identity.tenant(Shown(certificate_names=("blue",)))).name == "blue"
    assert (await identity.tenant(Shown(certificate_names=("host.example", "blue", "red")))).name == "blue"
    await refused(identity, Shown(certificate_names=("host.example", "Blue Team")), "names no tenant")
    await refused(identity, Shown(), "asks for a token")


async def test_a_token_goes_before_a_certificate(tokens: Tokens) -> None:
    identity = identity_of(tokens, QUOTAS, certificates=True)
    assert (await identity.tenant(Shown(RED, ("blue",)))).name == "red"
    blue = await identity.tenant(Shown(None, ("blue",)))
    assert (blue.name, blue.quotas.max_images) == ("blue", 1)
    await refused(identity, Shown("wrong", ("blue",)), "not known")


async def refused(identity: Identity, shown: Shown, message: str) -> None:
    with pytest.raises(Unauthenticated, match=message):
        await identity.tenant(shown)
