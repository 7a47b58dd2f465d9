"""What a client shows, where it takes it from, and the tokens that the command line makes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from atelier import AsyncClient, Client
from atelier.cli import cli
from atelier.security import Security
from atelier_server.access.tokens import SHORTEST_TOKEN, Tokens
from atelier_server.config import Quotas
from tests.unit.client.scripted_server import ScriptedServer

SECRET = "atl_" + "x" * 43


def test_arguments_go_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATELIER_TOKEN", "from the environment")
    monkeypatch.setenv("ATELIER_TLS_CA", "ca.pem")
    assert Security.of().metadata() == (("authorization", "Bearer from the environment"),)
    assert Security.of(token=SECRET).metadata() == (("authorization", f"Bearer {SECRET}"),)
    assert (Security.of().tls, Security.of().tls_ca) == (True, Path("ca.pem"))
    assert not Security.of(tls=False).tls


def test_a_token_file_is_read_at_every_call(tmp_path: Path) -> None:
    file = tmp_path / "token"
    security = Security.of(token_file=file)
    with pytest.raises(ValueError, match="No such file"):
        security.metadata()
    for token in ("first", "second\n"):
        file.write_text(token)
        assert security.metadata() == (("authorization", f"Bearer {token.strip()}"),)


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(ValueError, match="only together"):
        Security.of(tls_cert="cert.pem")


def test_a_token_in_the_clear_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "atelier"):
        Client("127.0.0.1:1", token=SECRET).close()
        assert not caplog.records
        Client("atelier.example.org:1", token=SECRET).close()
    assert "unencrypted" in caplog.text
    assert SECRET not in caplog.text


async def test_every_call_of_both_clients_carries_the_token(server: ScriptedServer) -> None:
    with Client(server.address, token=SECRET) as client:
        client.server_info()
        list(client.list_adapters())
        client.generate("x")
    async with AsyncClient(server.address, token=SECRET) as client:
        await client.server_info()
        await client.generate("x")
    assert server.tokens == [f"Bearer {SECRET}"] * 6  # the list has two pages


def run(*arguments: str, stdin: str = "") -> Any:
    return CliRunner().invoke(cli, arguments, input=stdin)


def test_the_command_line_shows_the_token(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(SECRET)
    assert run("info", "--server", server.address, "--token", SECRET).exit_code == 0
    assert run("info", "--server", server.address, "--token-file", str(tmp_path / "token")).exit_code == 0
    assert server.tokens == [f"Bearer {SECRET}"] * 2


def test_a_new_token_is_what_the_server_reads(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    made = run("token", "new", "red", "--append", str(file), "--expires", "1d", "--note", 'a "b"')
    mine = run("token", "new", "blue", "--append", str(file), "--stdin", stdin=f"{SECRET}\n")
    told = run("token", "new", "green", "--json")
    assert [done.exit_code for done in (made, mine, told)] == [0, 0, 0]
    with file.open("a") as tokens:
        tokens.write(json.loads(told.stdout)["entry"])
    tokens = Tokens(file, Quotas())
    assert tokens.holder(made.stdout.strip()).name == "red"
    assert tokens.holder(SECRET).name == "blue"
    assert tokens.holder(json.loads(told.stdout)["token"]).name == "green"
    assert made.stdout.strip() not in file.read_text()


@pytest.mark.parametrize(
    "arguments", [("Red",), ("red", "--expires", "soon"), ("red", "--stdin")], ids=["tenant", "end", "short"]
)
def test_a_bad_token_is_refused(arguments: tuple[str, ...]) -> None:
    done = run("token", "new", *arguments, stdin="x" * (SHORTEST_TOKEN - 1))
    assert done.exit_code == 2
    assert done.stdout == ""
