"""The tokens file: who holds a token, what it may not be, and how it changes under a running server."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

import pytest

from atelier_server.access.tokens import Tokens
from atelier_server.config import Quotas
from atelier_server.errors import StartError, TokenExpired, Unauthenticated

RED, BLUE, OLD = "r" * 40, "b" * 40, "o" * 40
SHORT = "s" * 31


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def entry(tenant: str, token: str, **more: str) -> str:
    lines = [f"{name} = {value}" for name, value in more.items()]
    return "\n".join(["[[token]]", f'tenant = "{tenant}"', f'sha256 = "{digest(token)}"', *lines]) + "\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


def test_every_token_has_its_tenant(path: Path) -> None:
    path.write_text(entry("red", RED) + entry("blue", BLUE))
    tokens = Tokens(path, Quotas())
    assert (tokens.holder(RED).name, tokens.holder(BLUE).name) == ("red", "blue")


@pytest.mark.parametrize("token", ["", "x" * 40, RED + " ", RED[:-1], digest(RED), "ü" * 40])
def test_a_wrong_token_is_refused_without_a_word_of_it(path: Path, token: str) -> None:
    path.write_text(entry("red", RED))
    with pytest.raises(Unauthenticated) as caught:
        Tokens(path, Quotas()).holder(token)
    assert caught.value.message == "the token is not known here"


def test_a_short_token_is_refused_though_it_is_listed(path: Path) -> None:
    path.write_text(entry("red", SHORT))
    with pytest.raises(Unauthenticated, match="not known"):
        Tokens(path, Quotas()).holder(SHORT)


@pytest.mark.parametrize(
    ("expires", "good"),
    [
        ("2020-01-01T00:00:00Z", False),
        ("2020-01-01", False),
        ("2999-01-01T00:00:00+02:00", True),
        ("2999-01-01", True),
    ],
)
def test_a_token_expires(path: Path, expires: str, good: bool) -> None:
    path.write_text(entry("red", OLD, expires=expires))
    tokens = Tokens(path, Quotas())
    if good:
        assert tokens.holder(OLD).name == "red"
    else:
        with pytest.raises(TokenExpired):
            tokens.holder(OLD)


def test_a_tenants_quotas_go_over_the_settings(path: Path) -> None:
    path.write_text(entry("red", RED) + entry("blue", BLUE) + "[tenant.red]\nmax_images = 1\n")
    tokens = Tokens(path, Quotas(max_images=9, max_trainings=2))
    assert tokens.holder(RED).quotas == Quotas(max_images=1, max_trainings=2)
    assert tokens.holder(BLUE).quotas == Quotas(max_images=9, max_trainings=2)


def test_a_changed_file_is_read_again(path: Path) -> None:
    path.write_text(entry("red", RED))
    tokens = Tokens(path, Quotas())
    replace(path, entry("blue", BLUE))
    assert tokens.holder(BLUE).name == "blue"
    with pytest.raises(Unauthenticated):
        tokens.holder(RED)


@pytest.mark.parametrize("content", [None, "not toml", "[[token]]\ntenant = 'red'\n"])
def test_a_file_that_becomes_wrong_changes_nothing(
    path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(entry("red", RED))
    tokens = Tokens(path, Quotas())
    if content is None:
        path.unlink()
    else:
        replace(path, content)
    with caplog.at_level(logging.ERROR):
        assert tokens.holder(RED).name == "red"
        assert tokens.holder(RED).name == "red"
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("[[token]", "is not TOML"),
        ('[[token]]\ntenant = "Red"\nsha256 = ""\n', "token.0.tenant: String should match"),
        (f'[[token]]\ntenant = "red"\nsha256 = "{RED}"\n', "token.0.sha256: String should match"),
        (entry("red", RED, expires="2027-01-01T00:00:00"), "token.0.expires"),
        (entry("red", RED, expiers='"never"'), "token.0.expiers: Extra inputs"),
        ("[tenant.red]\nmax_images = -1\n", "max_images: Input should be greater"),
        ("[tenant.red]\nmax_image = 1\n", "max_image: Extra inputs"),
        ("[tenants.red]\nmax_images = 1\n", "tenants: Extra inputs"),
    ],
)
def test_a_wrong_file_stops_the_start(path: Path, content: str | None, message: str) -> None:
    if content is not None:
        path.write_text(content)
    with pytest.raises(StartError, match=f"^--tokens-file: .*{re.escape(message)}") as caught:
        Tokens(path, Quotas())
    assert RED not in str(caught.value)


def replace(path: Path, content: str) -> None:
    """As tools do: a new file in the place of the old one."""
    temporary = path.with_suffix(".new")
    temporary.write_text(content)
    temporary.replace(path)
