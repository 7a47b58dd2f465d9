"""Three sources, one order of precedence, and every mistake in any of them at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atelier_server.config.printed import as_toml
from atelier_server.config.reading import SETTINGS, BadSettings, read


def problems(*arguments: str, **variables: str) -> str:
    with pytest.raises(BadSettings) as caught:
        read(arguments, variables)
    return str(caught.value)


def test_flags_go_over_variables_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "atelier.toml"
    file.write_text('port = 1\nslots = 21\nmodel = "m"\n[limits]\nmax_num_images = 3\nmax-width = 64\n')
    variables = {"ATELIER_PORT": "2", "ATELIER_SLOTS": "22", "ATELIER_LIMIT_MAX_WIDTH": "128"}
    settings, given = read(("--config", str(file), "--port", "3"), variables)
    assert (settings.port, settings.slots, settings.model) == (3, 22, "m")
    assert (settings.limits.max_num_images, settings.limits.max_width) == (3, 128)
    assert given["port",].source == "--port"
    assert given["slots",].source == "ATELIER_SLOTS"
    assert given["model",].source == f"model in {file}"


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "atelier.toml"
    file.write_text("port = 1\n")
    assert read((), {"ATELIER_CONFIG": str(file)})[0].port == 1


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "atelier.toml"
    file.write_text("slotz = 1\n[limits]\nmax_num_image = 3\nmax_width = 'wide'\n")
    text = problems(
        *("--config", str(file), "--prot", "5", "--device=tpu", "--metrics-port", "7", "--health-port", "7"),
        *("surplus", "--log-level"),
        ATELIER_THREADZ="1",
        ATELIER_PORT="x",
        ATELIER_DRAIN_SECONDS="-1",
    )
    for part in (
        "--prot: there is no such flag; did you mean --port?",
        "'surplus': belongs to no flag",
        "--log-level: needs a value",
        "ATELIER_THREADZ: there is no such variable; did you mean ATELIER_THREADS?",
        f"slotz in {file}: there is no such key; did you mean slots?",
        f"limits.max_num_image in {file}: there is no such key; did you mean limits.max_num_images?",
        "--device (ATELIER_DEVICE): 'tpu' is none of auto, cpu, cuda, cuda:N; got 'tpu'",
        "--port (ATELIER_PORT): Input should be a valid integer",
        "--limits.max-width (ATELIER_LIMIT_MAX_WIDTH): Input should be a valid integer",
        f"got 'wide' from limits.max_width in {file}",
        "--drain-seconds (ATELIER_DRAIN_SECONDS): Input should be greater than or equal to 0; got '-1'",
        "--health-port: 7 is --metrics-port already",
    ):
        assert text.count(part) == 1, part
    assert len(text.splitlines()) == 12 - 1  # the last of the two about max_width is the end of its line


def test_what_others_put_into_the_environment_is_left_alone() -> None:
    variables = {
        "ATELIER_SERVER": "host:1",
        "ATELIER_TOKEN": "secret",
        "ATELIER_SERVICE_HOST": "10.0.0.1",
        "ATELIER_SERVICE_PORT_GRPC": "50051",
        "ATELIER_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "ATELIER_METRICS_PORT_9090_TCP_ADDR": "10.0.0.1",
        "ATELIER_SLOTS": "",
        "PATH": "/bin",
    }
    assert read((), variables)[1] == {}


def test_a_service_link_of_kubernetes_is_explained() -> None:
    assert "enableServiceLinks: false" in problems(ATELIER_PORT="tcp://10.0.0.1:50051")


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), ("port = ", "is not TOML")])
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "atelier.toml"
    if content is not None:
        file.write_text(content)
    assert message in problems("--config", str(file))


def test_negative_numbers_and_switches() -> None:
    settings, _ = read(("--metrics-port", "-1", "--no-reflection", "--insecure"), {})
    assert (settings.metrics_port, settings.reflection, settings.insecure) == (-1, False, True)


def test_the_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(("--help",), {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(setting.flag in text and setting.variable in text for setting in SETTINGS)


def test_what_is_printed_can_be_read_again(tmp_path: Path) -> None:
    given_here = ("--port", "7", "--insecure", "--model", 'a "quoted" \\ name', "--limits.max-width", "8")
    settings, given = read(given_here, {"ATELIER_DRAIN_SECONDS": "1.5"})
    file = tmp_path / "atelier.toml"
    file.write_text(as_toml(settings, given))
    assert "port = 7  # --port\n" in file.read_text()
    assert "drain_seconds = 1.5  # ATELIER_DRAIN_SECONDS\n" in file.read_text()
    assert read(("--config", str(file)), {})[0] == settings


def test_passwords_are_masked_when_printed() -> None:
    settings, given = read(("--model", "https://me:hunter2@host/model"), {})
    assert 'model = "https://********@host/model"' in as_toml(settings, given)


@given(st.lists(st.text(max_size=20), max_size=6), st.dictionaries(st.text(max_size=8), st.text(max_size=8)))
def test_whatever_is_given_is_read_or_refused(arguments: list[str], variables: dict[str, str]) -> None:
    words = [word for word in arguments if word.split("=")[0] not in ("-h", "--help")]
    told: tuple[str, ...] = ("",)
    try:
        read(words, {f"ATELIER_{name}": value for name, value in variables.items()})
    except BadSettings as error:
        told = error.problems
    assert told


def test_controlnets_repeat_or_come_by_commas(tmp_path: Path) -> None:
    pairs = (("canny", "someone/canny"), ("depth", "/models/depth"))
    arguments = ("--controlnet", "canny=someone/canny", "--controlnet=depth=/models/depth")
    settings, given = read(arguments, {})
    assert settings.controlnets == pairs
    assert read((), {"ATELIER_CONTROLNET": "canny=someone/canny,depth=/models/depth"})[0].controlnets == pairs
    file = tmp_path / "atelier.toml"
    file.write_text(as_toml(settings, given))
    assert read(("--config", str(file)), {})[0].controlnets == pairs
    assert read((), {})[0].controlnets == ()
    for wrong, told in (
        ("canny", "'canny' is not NAME=REF, with a name of a-z"),
        ("Canny=x", "'Canny=x' is not NAME=REF"),
        ("a=x,a=y", "'a' is there twice; give each ControlNet a name of its own"),
    ):
        assert f"--controlnet (ATELIER_CONTROLNET): {told}" in problems("--controlnet", wrong)
    assert "--controlnet: needs a value" in problems("--controlnet", "a=x", "--controlnet")
