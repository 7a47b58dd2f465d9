"""TLS, mTLS, tokens: the real client against real server processes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from atelier import Client
from atelier.errors import NotFoundError, UnauthenticatedError, UnavailableError, UnimplementedError
from tests.process.certificates import Authority
from tests.process.server import FRONT, Server

pytestmark = pytest.mark.process

OTTO = Path(__file__).parents[2] / "examples" / "otto"
RED, BLUE, OLD, NEW = ("atl_" + letter * 43 for letter in "rbon")


def entry(tenant: str, token: str, more: str = "") -> str:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return f'[[token]]\ntenant = "{tenant}"\nsha256 = "{digest}"\n{more}\n'


class Guarded:
    """A server with TLS and tokens, and what a client needs for it."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "authority")
        self.pair = self.authority.issue("localhost")
        self.tokens = folder / "tokens.toml"
        self.write_tokens(entry("red", RED), entry("blue", BLUE), entry("red", OLD, "expires = 2020-01-01"))
        self.server = Server(
            folder / "data",
            *("--cert-file", str(self.pair.cert), "--key-file", str(self.pair.key)),
            *("--tokens-file", str(self.tokens), "--health-port", "0", "--log-level", "debug"),
            module=FRONT,
        )

    def write_tokens(self, *entries: str) -> None:
        temporary = self.tokens.with_suffix(".new")
        temporary.write_text("".join(entries))
        temporary.replace(self.tokens)

    @property
    def address(self) -> str:
        return self.server.address.replace("127.0.0.1", "localhost")

    def client(self, token: str | None = RED, **fields: Any) -> Client:
        return Client(
            self.address, **{"token": token, "tls_ca": self.authority.file, "timeout": 20, **fields}
        )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(tmp_path_factory.mktemp("guarded"))
    made.server.start()
    yield made
    assert made.server.stop() == 0


def test_the_right_token_over_tls(guarded: Guarded) -> None:
    with guarded.client() as client:
        assert client.server_info().ready
        assert client.generate("a red octopus", num_inference_steps=2).images[0].data


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (None, "UNAUTHENTICATED"),
        ("", "UNAUTHENTICATED"),
        ("atl_" + "x" * 43, "UNAUTHENTICATED"),
        (hashlib.sha256(RED.encode()).hexdigest(), "UNAUTHENTICATED"),
        (OLD, "TOKEN_EXPIRED"),
    ],
)
def test_a_wrong_or_expired_token_is_refused(guarded: Guarded, token: str | None, reason: str) -> None:
    with guarded.client(token) as client:
        for call in (client.server_info, lambda: client.generate("x"), lambda: client.delete_adapter("otto")):
            with pytest.raises(UnauthenticatedError) as caught:
                call()
            assert caught.value.reason == reason
            assert not token or token not in str(caught.value)


def test_anothers_adapter_and_training_are_not_found(guarded: Guarded, tmp_path: Path) -> None:
    (tmp_path / "guest.safetensors").write_bytes(b"weights")
    with guarded.client(RED) as red, guarded.client(BLUE) as blue:
        red.import_adapter(tmp_path / "guest.safetensors", "guest")
        recipe = {"images": [OTTO / "01.png"], "instance_prompt": "x", "max_train_steps": 2}
        training = list(red.train("otto", **recipe))[-1].training
        assert [adapter.name for adapter in red.list_adapters()] == ["guest", "otto"]
        assert [adapter.name for adapter in blue.list_adapters()] == []
        calls: tuple[Callable[[str], object], ...] = (
            blue.get_adapter,
            lambda name: blue.generate("x", adapters=name),
            blue.delete_adapter,
            blue.get_training,
            lambda name: next(blue.watch_training(name)),
        )
        for call in calls:
            refusals = []
            for name in ("otto", "nine"):
                with pytest.raises(NotFoundError) as caught:
                    call(name)
                refusals.append(str(caught.value).replace(name, "NAME"))
            assert refusals[0] == refusals[1]
        with pytest.raises(NotFoundError):
            blue.get_training(training)
        red.delete_adapter("guest")
        red.delete_adapter("otto")


def test_an_upload_without_a_token_is_refused(guarded: Guarded, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"x" * 2**20)
    with guarded.client(None) as client, pytest.raises(UnauthenticatedError):
        client.import_adapter(tmp_path / "x.safetensors", "otto")


def test_tokens_change_without_a_restart(guarded: Guarded) -> None:
    before = guarded.tokens.read_text()
    with guarded.client(NEW) as client, guarded.client(BLUE) as revoked:
        with pytest.raises(UnauthenticatedError):
            client.server_info()
        assert revoked.server_info().ready
        guarded.write_tokens(entry("red", RED), entry("red", NEW))
        assert client.server_info().ready
        with pytest.raises(UnauthenticatedError):
            revoked.server_info()
    guarded.write_tokens(before)


def test_a_server_of_another_authority_is_not_talked_to(guarded: Guarded, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger")
    with guarded.client(tls_ca=stranger.file, timeout=3) as client, pytest.raises(UnavailableError):
        client.server_info()
    with guarded.client(tls_ca=None, tls=False, timeout=3) as client, pytest.raises(UnavailableError):
        client.server_info()


def test_the_command_line_says_when_tls_may_be_missing(guarded: Guarded) -> None:
    atelier = str(Path(sys.executable).with_name("atelier"))
    command = [atelier, "info", "--token", RED, "--server"]
    plain = [*command, guarded.server.address]
    told = subprocess.run(plain, capture_output=True, text=True, check=False, timeout=120)
    assert told.returncode == 1
    assert "see --tls, --tls-ca" in told.stderr
    assert RED not in told.stderr
    told = subprocess.run(
        [*command, guarded.address, "--tls-ca", str(guarded.authority.file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (told.returncode, "tenant   red" in told.stdout) == (0, True)


def test_the_certificate_changes_without_a_restart(guarded: Guarded, tmp_path: Path) -> None:
    successor = Authority(tmp_path / "successor")
    with guarded.client() as connected:
        assert connected.server_info().ready
        successor.issue("localhost", to=guarded.pair.cert.parent)
        with guarded.client(tls_ca=successor.file) as client:
            assert client.server_info().ready
        assert connected.server_info().ready  # who is connected stays so
    # A half replaced pair changes nothing: the key alone is another one's.
    good = guarded.pair.key.read_bytes()
    guarded.pair.key.write_bytes(Authority(tmp_path / "half").issue("localhost").key.read_bytes())
    with guarded.client(tls_ca=successor.file) as client:
        assert client.server_info().ready
    guarded.pair.key.write_bytes(good)
    guarded.authority.issue("localhost", to=guarded.pair.cert.parent)
    with guarded.client() as client:
        assert client.server_info().ready


def test_probes_need_neither_tls_nor_a_token(guarded: Guarded) -> None:
    for service in ("", "atelier.v1.GenerationService"):
        assert guarded.server.health(service) == HealthCheckResponse.SERVING
    credentials = grpc.ssl_channel_credentials(guarded.authority.file.read_bytes())
    with grpc.secure_channel(guarded.address, credentials) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert answer.status == HealthCheckResponse.SERVING


def test_reflection_is_for_those_who_have_a_token(guarded: Guarded) -> None:
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    credentials = grpc.ssl_channel_credentials(guarded.authority.file.read_bytes())
    with grpc.secure_channel(guarded.address, credentials) as channel:
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        with pytest.raises(grpc.RpcError) as caught:
            next(ask(iter([question]), timeout=20))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        answer = next(ask(iter([question]), timeout=20, metadata=(("authorization", f"Bearer {RED}"),)))
    assert "atelier.v1.GenerationService" in {s.name for s in answer.list_services_response.service}


def test_the_health_port_has_health_alone(guarded: Guarded) -> None:
    with Client(guarded.server.health_address, timeout=20) as client, pytest.raises(UnimplementedError):
        client.server_info()


def test_no_token_is_in_logs_and_metrics(guarded: Guarded) -> None:
    with guarded.client() as client:
        assert client.server_info().ready
    guarded.server.metrics()
    told = (guarded.server.data_dir / "server.log").read_text() + str(guarded.server.metrics())
    for token in (RED, BLUE, OLD, NEW):
        assert token not in told
        assert hashlib.sha256(token.encode()).hexdigest() not in told


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Authority]]:
    folder = tmp_path_factory.mktemp("mutual")
    authority = Authority(folder / "authority")
    pair = authority.issue("localhost")
    server = Server(
        folder / "data",
        *("--cert-file", str(pair.cert), "--key-file", str(pair.key)),
        *("--client-ca-file", str(authority.file), "--health-port", "0"),
        module=FRONT,
    )
    yield server.start(), authority
    assert server.stop() == 0


def test_mutual_tls(mutual: tuple[Server, Authority], tmp_path: Path) -> None:
    server, authority = mutual
    address = server.address.replace("127.0.0.1", "localhost")

    def client(issuer: Authority | None, *names: str, **fields: Any) -> Client:
        pair = issuer.issue(*names, to=tmp_path / names[0], **fields) if issuer else None
        cert, key = (pair.cert, pair.key) if pair else (None, None)
        return Client(address, tls_ca=authority.file, tls_cert=cert, tls_key=key, timeout=5)

    with client(authority, "red") as red:
        assert red.server_info().ready
    with client(authority, "laptop.example.org", common_name="red") as by_common_name:
        assert by_common_name.server_info().ready
    with client(authority, "laptop.example.org") as nobody, pytest.raises(UnauthenticatedError) as caught:
        nobody.server_info()
    assert "names no tenant" in caught.value.message
    expired = {"not_after": datetime(2021, 1, 1, tzinfo=UTC)}
    for bad in (
        client(None),
        client(Authority(tmp_path / "stranger"), "red"),
        client(authority, "red", **expired),
    ):
        with bad, pytest.raises(UnavailableError):
            bad.server_info()


def test_a_server_that_would_be_open_does_not_start(tmp_path: Path) -> None:
    pair = Authority(tmp_path / "authority").issue("localhost")
    (tmp_path / "tokens.toml").write_text("[[token]]\n")
    options = [
        "--host",
        "0.0.0.0",
        "--port",
        "0",
        "--metrics-port",
        "-1",
        "--data-dir",
        str(tmp_path / "data"),
    ]

    def told(*more: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "atelier_server", *options, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return done.returncode, done.stderr

    code, text = told()
    assert code == 2
    assert "without TLS (--cert-file, --key-file) and without tokens" in text
    other = Authority(tmp_path / "other").issue("localhost")
    code, text = told(
        *("--cert-file", str(pair.cert), "--key-file", str(other.key)),
        *("--tokens-file", str(tmp_path / "tokens.toml")),
    )
    assert code == 1
    assert "are no pair" in text
    assert "token.0.tenant: Field required" in text
