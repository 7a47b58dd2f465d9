"""The command line against the scripted server, in this process and as a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner, Result

from atelier.cli import cli, connection, hints, output
from atelier.errors import AtelierError, InvalidArgumentError, Violation

ATELIER = str(Path(sys.executable).with_name("atelier"))


@pytest.fixture
def run(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command in a folder of its own against the scripted server."""
    monkeypatch.setenv("ATELIER_SERVER", server.address)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_generate_writes_a_picture(run: Callable[..., Result], server: Any, tmp_path: Path) -> None:
    done = run("generate", "an octopus", "--seed", 7, "--num-inference-steps", 9, "--adapter", "otto@6:0.5")
    assert done.exit_code == 0, done.output
    assert done.stdout == "out.png  seed 7\n"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    (request,) = server.script.generates
    assert (request.num_inference_steps, request.adapters[0].adapter) == (9, "otto@6:0.5")
    assert not request.HasField("guidance_scale")


def test_pictures_are_sent_from_files(run: Callable[..., Result], server: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"first")
    (tmp_path / "m.png").write_bytes(b"mask")
    done = run("generate", "x", "--image", "a.png", "--mask-image", "m.png", "--strength", 0.5)
    assert done.exit_code == 0, done.output
    (request,) = server.script.generates
    assert (request.image, request.mask_image, request.strength) == (b"first", b"mask", 0.5)


def test_previews_are_written_beside_the_picture(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("generate", "x", "--preview-steps", 5, "-o", "x.webp", "--json")
    (told,) = [line["preview"] for line in map(json.loads, done.stdout.splitlines()) if "preview" in line]
    assert told == {"index": 0, "step": 5, "mime_type": "image/png", "path": "x.preview.png"}
    with Image.open(tmp_path / "x.preview.png") as preview:
        assert preview.size == (8, 8)


def test_several_pictures_are_numbered_and_the_suffix_is_the_format(
    run: Callable[..., Result], server: Any, tmp_path: Path
) -> None:
    done = run("generate", "x", "--num-images", 3, "-o", "x.webp", "--sheet", "sheet.png")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sheet.png", "x-0.webp", "x-1.webp", "x-2.webp"]
    assert server.script.generates[0].image_format == 3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 192


def test_json_tells_events_with_the_contracts_names(run: Callable[..., Result]) -> None:
    done = run("generate", "x", "--seed", 2**40, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [next(iter(line)) for line in lines] == ["queued", "progress", "image", "completed"]
    assert lines[0] == {"queued": {"position": 0}}
    image = lines[2]["image"]
    assert image["path"] == "out.png"
    assert image["seed"] == str(2**40)
    assert "data" not in image
    assert lines[3]["completed"]["receipt"]["base_model"] == "pocket"


def test_a_prompt_without_the_trigger_gets_a_hint(run: Callable[..., Result]) -> None:
    assert "hint: otto" in run("generate", "an octopus", "--adapter", "otto").stderr
    assert "hint" not in run("generate", "a SKS octopus", "--adapter", "otto").stderr


@pytest.mark.parametrize(
    ("trigger", "rare"),
    [
        ("a sks blue plush octopus", ["sks"]),
        ("a v1ct0r toy", ["v1ct0r"]),
        ("the blue octopus", ["blue", "octopus"]),
        ("", []),
    ],
)
def test_rare_words(trigger: str, rare: list[str]) -> None:
    assert hints.rare_words(trigger) == rare
    assert hints.lacks_trigger("a red car", trigger) == bool(rare)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "x", "-o", "x.gif"),
        ("generate", "x", "-o", "x.png", "--image-format", "jpeg"),
        ("generate", "x", "-o", "none/x.png"),
        ("generate", "x", "--width", "wide"),
        ("generate", "x", "--image-format", "gif"),
        ("generate", "x", "--image", "nothing.png"),
        ("generate",),
        ("nonsense",),
        ("train", "."),
    ],
)
def test_usage_errors_exit_2(run: Callable[..., Result], server: Any, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
    assert not server.script.generates


def test_every_violation_has_a_line(
    run: Callable[..., Result], server: Any, full_refusal: grpc.Status
) -> None:
    server.script.refuse = full_refusal
    done = run("generate", "x")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: INVALID_ARGUMENT INVALID_REQUEST",
        "  width: must be a multiple of 8",
        "  seed: must not be negative",
        "  try again in 2.5 s",
    ]


def test_a_message_that_says_more_than_the_violations_stays(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_error(InvalidArgumentError("bad picture", violations=[Violation("images[0]", "too large")]))
    output.print_error(AtelierError("odd"))
    assert capsys.readouterr().err.splitlines() == [
        "error: INVALID_ARGUMENT: bad picture",
        "  images[0]: too large",
        "error: UNKNOWN: odd",
    ]


def test_train_tells_estimate_progress_and_result(
    run: Callable[..., Result], server: Any, folder: Path, tmp_path: Path
) -> None:
    flags = ("--rank", 4, "--random-flip", "--validation-prompts", "a", "--validation-prompts", "b")
    done = run(
        "train", folder, "--name", "otto", "--instance-prompt", "a sks", *flags, "--samples", tmp_path / "s"
    )
    assert done.exit_code == 0, done.output
    recipe = server.script.uploads[0][0].start.recipe
    assert (recipe.rank, recipe.random_flip, list(recipe.validation_prompts)) == (4, True, ["a", "b"])
    assert not recipe.HasField("seed")
    assert "estimate: 1 min 15 s, memory unknown" in done.stdout
    assert "checkpoint otto@6" in done.stdout
    assert "succeeded after 6 steps" in done.stdout
    assert "6/6  loss 0.1667" in done.stderr
    assert (tmp_path / "s" / "step-000006-0.png").exists()


def test_train_json_is_the_events(run: Callable[..., Result], folder: Path) -> None:
    done = run("train", folder, "--name", "otto", "--instance-prompt", "x", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [int(line["seq"]) for line in lines] == list(range(1, 11))
    assert lines[0]["accepted"]["adapter"] == "otto"
    assert lines[0]["create_time"] == "2027-01-15T08:00:01Z"
    assert lines[-1]["completed"]["state"] == "TRAINING_STATE_SUCCEEDED"
    assert "data" not in lines[-2]["sample"]


def test_train_detaches(run: Callable[..., Result], folder: Path) -> None:
    done = run("train", folder, "--name", "otto", "--instance-prompt", "x", "--detach")
    assert done.exit_code == 0
    (line,) = [line for line in done.stderr.splitlines() if "atelier trainings watch" in line]
    assert line.startswith("detached; the training goes on.")
    # As it can be typed: the server is not the default one.
    again = line.partition("atelier ")[2].split()
    assert again[:3] == ["trainings", "watch", "otto-k3f9"]
    assert CliRunner().invoke(cli, again, env={"ATELIER_SERVER": None}).exit_code == 0
    assert "checkpoint" not in done.stdout


def test_the_flags_of_a_connection_are_told_again_without_the_token(tmp_path: Path) -> None:
    told: list[str] = []

    def command(*, server: str) -> None:
        told.append(connection.again(server))

    given = dict.fromkeys(option.name for option in connection._OPTIONS)
    run = connection.with_connection(command)
    run(server=connection.DEFAULT_ADDRESS, **given)
    run(
        server="far:1",
        **{**given, "token": "secret", "token_file": Path("my token"), "tls": True, "tls_ca": Path("ca.pem")},
    )
    assert told == ["", " --server far:1 --token-file 'my token' --tls --tls-ca ca.pem"]


def test_leaving_may_cancel_but_not_at_once(run: Callable[..., Result], folder: Path) -> None:
    done = run(
        "train", folder, "--name", "otto", "--instance-prompt", "x", "--detach", "--cancel-on-disconnect"
    )
    assert done.exit_code == 2
    assert "would cancel the training at once" in done.stderr


def test_a_request_has_the_id_that_is_given(run: Callable[..., Result], server: Any, folder: Path) -> None:
    mine = "0f8fad5b-d9cb-469f-a165-70867728950e"
    assert run("generate", "x", "--request-id", mine).exit_code == 0
    assert server.script.generates[-1].request_id == mine
    assert (
        run("train", folder, "--name", "otto", "--instance-prompt", "x", "--request-id", mine).exit_code == 0
    )
    assert server.script.uploads[-1][0].start.request_id == mine


def test_an_empty_folder_is_refused(run: Callable[..., Result], server: Any, tmp_path: Path) -> None:
    done = run("train", tmp_path, "--name", "otto", "--instance-prompt", "x")
    assert done.exit_code == 1
    assert "holds no pictures" in done.stderr
    assert not server.script.uploads


def test_adapters(run: Callable[..., Result], server: Any, tmp_path: Path) -> None:
    assert "zoe" in run("adapters", "list").stdout
    listed = json.loads(run("adapters", "list", "--json").stdout)
    assert [adapter["name"] for adapter in listed["adapters"]] == ["bolt", "otto", "zoe"]
    assert listed["adapters"][0]["checkpoints"][0]["size_bytes"] == "1536"
    assert "recipe" not in listed["adapters"][0]  # it was not taught here
    assert "otto@v1@6  (recommended)" in run("adapters", "show", "otto").stdout
    assert json.loads(run("adapters", "show", "otto", "--json").stdout)["recommended_step"] == 6
    assert run("adapters", "load", "otto").stdout == "otto@6 loaded\n"
    assert json.loads(run("adapters", "load", "otto", "--json").stdout)["loaded"] is True
    assert json.loads(run("adapters", "unload", "otto", "--json").stdout) == {"unloaded": 2}
    deleted = json.loads(run("adapters", "delete", "otto", "--json").stdout)
    assert deleted == {"expire_time": "2033-05-18T03:33:20Z"}
    source = tmp_path / "a.safetensors"
    source.write_bytes(b"weights")
    told = run("adapters", "import", source, "--name", "zoe", "--allow-partial").stdout
    for words in ("32 layers, kohya", "written by OneTrainer", "cross-attention is 2048 wide", "2 dora"):
        assert words in told
    for words in ("0.5 (x1), 8 (x1)", "<zoe> (2 vectors", "moves by 12.5%", "12 parts were left out (25.0%"):
        assert words in told
    assert told.count("no such module") == 10
    assert server.script.imports[-1][0].metadata.allow_partial
    assert run("adapters", "import", tmp_path / "none", "--name", "zoe").exit_code == 1
    imported = json.loads(run("adapters", "import", source, "--name", "zoe", "--json").stdout)
    assert imported["adapter"]["name"] == "zoe"


def test_export(run: Callable[..., Result], server: Any, tmp_path: Path) -> None:
    damaged = run("adapters", "export", "otto", "-o", "b.safetensors")
    assert damaged.exit_code == 1
    assert "DATA_LOSS" in damaged.stderr
    server.script.export_digest = hashlib.sha256(server.script.export).hexdigest()
    done = run("adapters", "export", "otto", "-o", "a.safetensors", "--format", "kohya", "--json")
    assert json.loads(done.stdout)["path"] == "a.safetensors"
    assert (tmp_path / "a.safetensors").read_bytes() == b"weights"


def test_trainings(run: Callable[..., Result]) -> None:
    assert "otto-k3f9" in run("trainings", "list").stdout
    assert json.loads(run("trainings", "list", "--json").stdout)["trainings"][0]["id"] == "otto-k3f9"
    assert json.loads(run("trainings", "show", "otto", "--json").stdout)["recipe"]["rank"] == 8
    assert "running" in run("trainings", "show", "otto").stdout
    assert "cancelled" in run("trainings", "cancel", "otto").stdout
    assert "queued" in run("trainings", "resume", "otto").stdout
    assert run("trainings", "delete", "otto").exit_code == 0
    watched = run("trainings", "watch", "otto-k3f9", "--after-seq", 8, "--json").stdout.splitlines()
    assert [json.loads(line)["seq"] for line in watched] == ["9", "10"]


def test_info_exits_0_only_when_ready(run: Callable[..., Result], server: Any) -> None:
    ready = run("info")
    assert ready.exit_code == 0
    assert "teaches  lora, pivotal; no\n" in ready.stdout
    server.script.ready = False
    done = run("info")
    assert done.exit_code == 1
    assert "not ready: loading pocket" in done.stdout
    told = run("info", "--json")
    assert told.exit_code == 1
    assert json.loads(told.stdout)["ready"] is False
    server.stop()
    away = run("info")
    assert away.exit_code == 1
    assert away.stderr.startswith("error: UNAVAILABLE")


def test_an_interrupted_import_goes_on(run: Callable[..., Result], server: Any, tmp_path: Path) -> None:
    source, data = tmp_path / "a.safetensors", os.urandom(3 * 2**20)
    source.write_bytes(data)
    server.script.held = 2**20 + 5
    assert run("adapters", "import", source, "--name", "zoe").exit_code == 0
    asked, (first, *chunks) = server.script.calls[-1], server.script.imports[-1]
    assert (asked.size_bytes, asked.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert first.metadata.offset == 2**20 + 5
    assert b"".join(message.chunk for message in chunks) == data[2**20 + 5 :]


def test_labels(run: Callable[..., Result], server: Any) -> None:
    assert (
        run("adapters", "tag", "otto@6", "production").stdout == "otto@production is otto@6, was otto@v1@3\n"
    )
    assert not server.script.calls[-1].HasField("expected")
    told = run("adapters", "tag", "otto@6", "production", "--expected", "", "--json")
    assert json.loads(told.stdout) == {"previous": "v1@3"}
    assert server.script.calls[-1].expected == ""
    assert server.script.calls[-1].HasField("expected")
    assert run("adapters", "untag", "otto@production").stdout == "otto@production removed, was otto@v1@6\n"
    assert (server.script.calls[-1].adapter, server.script.calls[-1].tag) == ("otto", "production")
    assert run("adapters", "note", "otto", "a rainy day").stdout == "otto@v1: a rainy day\n"
    assert "undelete otto` brings it back until 2033-" in run("adapters", "delete", "otto").stdout
    assert run("adapters", "undelete", "otto").stdout == "otto@v1 is back\n"


def test_a_list_with_everything(run: Callable[..., Result], server: Any, tmp_path: Path) -> None:
    flags = (
        "--name-prefix",
        "o",
        "--tag",
        "best",
        "--base",
        "sd1",
        "--resident",
        "--order-by",
        "size_bytes desc",
    )
    listed = run("adapters", "list", *flags, "--all-versions")
    assert "2 KiB" in listed.stdout
    assert "disk" in listed.stdout
    sent = server.script.calls[-1]
    assert (sent.name_prefix, sent.tag, sent.base, sent.resident) == ("o", "best", "sd1", True)
    assert (sent.order_by, sent.all_versions, sent.view) == ("size_bytes desc", True, 0)
    sheet = tmp_path / "sheet.png"
    told = json.loads(run("adapters", "list", "--sheet", str(sheet), "--json").stdout)
    assert server.script.calls[-1].view == 1
    assert not any(adapter["thumbnail"] for adapter in told["adapters"])
    with Image.open(sheet) as picture:
        assert picture.width > 3 * 128
    wrong = run("adapters", "list", "--view", "everything")
    assert wrong.exit_code == 2


def test_an_unknown_adapter_is_one_line(
    run: Callable[..., Result], server: Any, make_refusal: Callable[..., grpc.Status]
) -> None:
    info = error_details_pb2.ErrorInfo(reason="ADAPTER_NOT_FOUND", domain="atelier")
    server.script.refuse = make_refusal(grpc.StatusCode.NOT_FOUND, "no adapter 'nobody'", info)
    done = run("adapters", "show", "nobody")
    assert (done.exit_code, done.stderr) == (1, "error: NOT_FOUND ADAPTER_NOT_FOUND: no adapter 'nobody'\n")


# ------------------------------------------------------------------------------------------------- serve
def test_serve_becomes_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: called.append(arguments))
    assert CliRunner().invoke(cli, ["serve", "--help", "--port", "0"]).exit_code == 0
    assert called == [[sys.executable, "-m", "atelier_server", "--help", "--port", "0"]]


def test_serve_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atelier.cli.local_server.NEEDED", ("surely_not_installed",))
    done = CliRunner().invoke(cli, ["serve"])
    assert done.exit_code == 1
    assert "pip install 'atelier[server]'" in done.stderr


# --------------------------------------------------------------------------------------------- a process
def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from _commands(command, (*path, name))


@pytest.mark.parametrize("command", sorted(set(_commands(get_command(cli))) - {("serve",)}), ids=" ".join)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, [*command, "--help"])
    assert (done.exit_code, done.exception) == (0, None)
    assert "Usage" in done.stdout


def test_help_is_fast() -> None:
    """In seconds of a processor: what else the machine does is no matter."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([ATELIER, "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "generate" in done.stdout
    assert min(times) < 1.0


def test_exit_codes_of_the_process(server: Any, tmp_path: Path) -> None:
    def code(*arguments: str) -> int:
        return subprocess.run(
            [ATELIER, *arguments], check=False, capture_output=True, cwd=tmp_path
        ).returncode

    assert code("generate", "x", "--server", server.address) == 0
    assert code("info", "--server", "127.0.0.1:1") == 1
    assert code("generate") == 2


@pytest.mark.parametrize("cancels", [False, True])
def test_ctrl_c_detaches_and_says_how_to_come_back(server: Any, folder: Path, cancels: bool) -> None:
    server.script.pause_after = 3
    more = ["--cancel-on-disconnect"] if cancels else []
    # What runs in the background of a shell is born ignoring Ctrl-C, and so would its children be.
    environment = ("env", "--default-signal=INT")
    process = subprocess.Popen(
        [*environment, ATELIER, "train", str(folder), "--name", "otto", "--instance-prompt", "x", *more],
        env={**os.environ, "ATELIER_SERVER": server.address},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("training otto-k3f9")
    assert server.script.paused.wait(60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert f"atelier trainings watch otto-k3f9 --server {server.address}\n" in said
    assert ("stopped; the training is cancelled" in said, "detached; " in said) == (cancels, not cancels)


def test_ctrl_c_in_generate_says_so(server: Any, tmp_path: Path) -> None:
    server.script.pause_generate = True
    process = subprocess.Popen(
        ["env", "--default-signal=INT", ATELIER, "generate", "x"],
        env={**os.environ, "ATELIER_SERVER": server.address},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.script.paused.wait(60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.endswith("stopped\n")
    assert "Traceback" not in said


def test_a_demo_needs_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("atelier.cli.local_server.NEEDED", ("atelier", "no_such_package"))
    done = CliRunner().invoke(cli, ["demo", "--output", str(tmp_path / "demo")])
    assert done.exit_code == 1
    assert "the server needs no_such_package" in done.stderr
    assert not (tmp_path / "demo").exists()
