"""Lines of the log: JSON that parses, ids from where the work comes from, one line a record."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atelier_server import logs, origin
from atelier_server.origin import Origin

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_log = logging.getLogger("atelier_server.test")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """pytest's own handlers come back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    root.handlers[:] = handlers
    logging.captureWarnings(False)
    root.setLevel(level)


def configured(wanted: logs.Format = "json", level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    logs.configure(wanted, level, "front", stream)
    return stream


def test_a_line_of_json_has_what_is_known() -> None:
    stream = configured()
    with logs.about(training="otto-1"):
        _log.info("went %s", "well", extra={"adapter": "otto@100"})
    line = json.loads(stream.getvalue())
    assert line.pop("timestamp").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "atelier_server.test",
        "message": "went well",
        "process": "front",
        "training": "otto-1",
        "adapter": "otto@100",
    }


async def test_a_line_says_which_call_it_comes_from() -> None:
    stream = configured()

    async def call(name: str) -> None:
        origin.set_current(Origin(name, TRACEPARENT))
        await asyncio.sleep(0)
        _log.info("in %s", name)

    await asyncio.gather(*(asyncio.create_task(call(name)) for name in "ab"))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["message"], line["request_id"]) for line in lines] == [("in a", "a"), ("in b", "b")]
    assert {line["trace_id"] for line in lines} == {"0af7651916cd43dd8448eb211c80319c"}
    _log.info("outside")
    assert "request_id" not in json.loads(stream.getvalue().splitlines()[-1])


def test_what_a_record_says_itself_wins() -> None:
    stream = configured()
    with logs.about(training="outer"):
        with logs.about(training="inner", adapter="otto"):
            _log.info("a")
            _log.info("b", extra={"training": "own"})
        _log.info("c")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["training"] for line in lines] == ["inner", "own", "outer"]
    assert [line.get("adapter") for line in lines] == ["otto", "otto", None]


def test_text_has_the_ids_at_the_end() -> None:
    stream = configured("text")
    _log.info("checkpoint published", extra={"training": "otto-1", "adapter": "otto@100", "secret": "x"})
    assert stream.getvalue().endswith(
        " INFO front atelier_server.test: checkpoint published [training=otto-1 adapter=otto@100]\n"
    )


def test_an_error_keeps_its_traceback() -> None:
    stream = configured()
    try:
        raise ValueError("broken")
    except ValueError:
        _log.exception("failed")
    line = json.loads(stream.getvalue())
    assert "ValueError: broken" in line["exc_info"]
    assert line["level"] == "ERROR"


def test_levels_are_heeded() -> None:
    stream = configured(level="warning")
    _log.info("quiet")
    _log.warning("loud")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_warnings_of_libraries_are_lines_too() -> None:
    stream = configured()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old habits", UserWarning, stacklevel=1)
    line = json.loads(stream.getvalue())
    assert (line["level"], line["logger"]) == ("WARNING", "py.warnings")
    assert "old habits" in line["message"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_auto_is_text_on_a_terminal_only() -> None:
    assert logs.resolve("auto", Terminal()) == "text"
    assert logs.resolve("auto", io.StringIO()) == "json"
    assert logs.resolve("json", Terminal()) == "json"


@given(st.text(), st.text())
def test_whatever_is_logged_stays_one_line_of_json(message: str, adapter: str) -> None:
    stream = configured()
    _log.info("%s", message, extra={"adapter": adapter})
    (line,) = stream.getvalue().rstrip("\n").split("\n")
    assert json.loads(line)["message"] == message
    assert json.loads(line)["adapter"] == adapter


def test_a_trace_context_says_whether_it_is_sampled() -> None:
    assert Origin("a", TRACEPARENT).traced
    assert Origin("a", TRACEPARENT[:-1] + "3").traced  # another flag beside
    assert not Origin("a", TRACEPARENT[:-1] + "0").traced
    assert not Origin("a").traced
    assert Origin("a").trace_id == ""
