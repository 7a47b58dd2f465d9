"""Merging, extracting and comparing by both clients and on the command line, against a scripted server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result

import atelier
from atelier.cli import cli
from tests.unit.client.scripted_server import ScriptedServer


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, server: ScriptedServer) -> Callable[..., Any]:
    """Calls a method of one of the two clients."""

    async def wait(method: str, *arguments: Any, **options: Any) -> Any:
        async with atelier.AsyncClient(server.address) as client:
            return await getattr(client, method)(*arguments, **options)

    def made(method: str, *arguments: Any, **options: Any) -> Any:
        if request.param == "async":
            return asyncio.run(wait(method, *arguments, **options))
        with atelier.Client(server.address) as client:
            return getattr(client, method)(*arguments, **options)

    return made


def test_merge(call: Callable[..., Any], server: ScriptedServer) -> None:
    merged = call("merge_adapters", ["otto:0.7", "zoe"], "both", rank=4, trigger="sks", new_version=True)
    assert isinstance(merged, atelier.MergedAdapter)
    assert (merged.adapter.name, merged.kept) == ("both", 0.75)
    [request] = server.script.calls
    assert (list(request.adapters), request.rank) == (["otto:0.7", "zoe"], 4)
    assert (request.trigger, request.new_version) == ("sks", True)
    call("merge_adapters", ["otto"], "one")
    assert not server.script.calls[1].HasField("rank")


def test_extract(call: Callable[..., Any], server: ScriptedServer) -> None:
    told: list[tuple[int, int]] = []
    extracted = call(
        "extract_adapter", "o/tuned", "made", 8, base="o/base", progress=lambda *p: told.append(p)
    )
    assert isinstance(extracted, atelier.ExtractedAdapter)
    assert (extracted.adapter.name, extracted.kept, told) == ("made", 0.5, [(0, 2), (1, 2), (2, 2)])
    [request] = server.script.calls
    assert (request.tuned, request.base, request.rank) == ("o/tuned", "o/base", 8)
    assert call("extract_adapter", "o/tuned", "made", 8).kept == 0.5
    with pytest.raises(atelier.InternalError, match="without a result"):
        call("extract_adapter", "o/tuned", "cut-off", 8)


def test_diff(call: Callable[..., Any]) -> None:
    found = call("diff_adapters", "otto", "zoe")
    assert isinstance(found, atelier.AdapterDiff)
    assert (found.a, found.b, len(found.only_a), found.only_b, found.common) == ("otto@6", "zoe@6", 12, (), 2)
    assert (found.differing[0].rank_a, found.differing[0].kind_b) == (4, "full")
    assert (found.blocks[0].cosine, found.whole.cosine) == (-1.0, None)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("merge_adapters", (["otto"], "both")),
        ("extract_adapter", ("o/tuned", "made", 8)),
        ("diff_adapters", ("otto", "zoe")),
    ],
)
def test_refusals_are_errors(
    call: Callable[..., Any],
    server: ScriptedServer,
    full_refusal: grpc.Status,
    method: str,
    arguments: tuple[Any, ...],
) -> None:
    server.script.refuse = full_refusal
    with pytest.raises(atelier.InvalidArgumentError):
        call(method, *arguments)


# -------------------------------------------------------------------------------------------- command line
def run(server: ScriptedServer, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["adapters", *arguments, "--server", server.address])


def test_commands_say_what_was_made(server: ScriptedServer) -> None:
    merged = run(server, "merge", "otto:0.7", "zoe", "--name", "both", "--rank", "4")
    assert merged.stdout == "both@v1: rank 8, 75.00% of the change kept\n"
    extracted = run(server, "extract", "--tuned", "o/tuned", "--name", "made", "--rank", "8")
    assert extracted.stdout == "made@v1: rank 8, 50.00% of the change kept\n"
    whole = run(server, "merge", "otto", "--name", "both", "--json")
    assert json.loads(whole.stdout)["adapter"]["name"] == "both"


def test_a_diff_is_told_block_by_block(server: ScriptedServer) -> None:
    told = run(server, "diff", "otto", "zoe").stdout
    assert told.startswith("2 modules in both, 12 only in otto@6, 0 only in zoe@6\n")
    assert "and 2 more (--json lists them all)" in told
    assert "in different forms: 1 as lora of rank 4, alpha 2 and a full difference" in told
    assert ["unet.mid_block", "1", "2", "3", "-1.0000"] in [line.split() for line in told.splitlines()]
    assert ["all", "1", "0", "0", "-"] in [line.split() for line in told.splitlines()]
    assert len(json.loads(run(server, "diff", "otto", "zoe", "--json").stdout)["only_a"]) == 12


def test_what_is_missing_is_a_usage_error(server: ScriptedServer) -> None:
    for arguments in (
        ("merge", "otto"),
        ("merge", "--name", "x"),
        ("extract", "--tuned", "x", "--name", "y"),
    ):
        assert run(server, *arguments).exit_code == 2
