"""Settings fail loudly, together, and say what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from atelier_server.config import Limits, Settings

TLS: dict[str, Any] = {"cert_file": Path("server.crt"), "key_file": Path("server.key")}
TOKENS: dict[str, Any] = {"tokens_file": Path("tokens.toml")}


def test_the_defaults_are_the_contracts() -> None:
    settings = Settings()
    assert (settings.model, settings.host, settings.port, settings.metrics_port) == (
        "pocket",
        "127.0.0.1",
        50051,
        9090,
    )


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"port": 70000, "device": "tpu", "colour": "red"})
    assert {error["loc"][0] for error in caught.value.errors()} == {"port", "device", "colour"}
    assert "'tpu' is none of auto, cpu, cuda, cuda:N" in str(caught.value)


def test_one_picture_must_fit_the_slots() -> None:
    with pytest.raises(ValidationError, match="slots: 2 are too few for one picture"):
        Settings(slots=2)
    assert Settings(slots=2, limits=Limits(max_adapters_per_image=2)).slots == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": 7, "metrics_port": 7}, "--metrics-port: 7 is --port already"),
        ({"health_port": 9090}, "--health-port: 9090 is --metrics-port already"),
        ({"cert_file": "server.crt"}, "--key-file: is missing"),
        ({"key_file": "server.key"}, "--cert-file: is missing"),
        ({"client_ca_file": "ca.crt"}, "--client-ca-file: goes only with"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings(**fields)


def test_what_is_offloaded_is_named() -> None:
    assert Settings.model_validate({"offload": "text_encoders,vae,vae"}).offload == ("text_encoders", "vae")
    with pytest.raises(ValidationError, match="'unet' is none of text_encoders, vae"):
        Settings.model_validate({"offload": ["vae", "unet"]})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "atelier.example.org"])
def test_beyond_loopback_only_with_tls_and_an_identity(host: str) -> None:
    for fields, lacking in (({}, "TLS"), (TLS, "tokens"), (TOKENS, "TLS")):
        with pytest.raises(ValidationError, match=f"--host: {host} can be reached .* without {lacking}"):
            Settings(host=host, **fields)
    assert Settings(host=host, insecure=True).host == host
    assert Settings(host=host, **TLS, **TOKENS).authenticates
    assert Settings(host=host, **TLS, client_ca_file=Path("ca.crt")).authenticates


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_neither_and_leaves_without_notice(host: str) -> None:
    assert Settings(host=host).notice_seconds == 0
    assert Settings(host=host, drain_notice_seconds=2).notice_seconds == 2


def test_a_server_for_others_leaves_with_notice() -> None:
    assert Settings(host="0.0.0.0", insecure=True).notice_seconds == 5


@pytest.mark.parametrize(
    ("given", "seconds"), [("30d", 30 * 86400.0), ("36h", 36 * 3600.0), ("90", 90.0), (0, 0.0), (None, None)]
)
def test_pictures_are_kept_for_seconds_or_days(given: Any, seconds: float | None) -> None:
    assert Settings(training_retention=given).training_retention == seconds


@pytest.mark.parametrize("given", ["-1", "a month", "30 days", "1w"])
def test_no_duration_is_no_retention(given: str) -> None:
    with pytest.raises(ValidationError, match="training_retention"):
        Settings.model_validate({"training_retention": given})
