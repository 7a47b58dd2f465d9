"""docs/operations.md and docs/runbook.md: every command in them can be typed."""

from __future__ import annotations

import contextlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from typer.main import get_command

from atelier.cli import cli
from atelier_server.config import Quotas
from atelier_server.config.reading import SETTINGS, read
from benchmarks import sizing
from tests.unit.k8s.kustomize import render

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").replace("\\\n", "")
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
PAGES = OPERATIONS + RUNBOOK
# Variables of the build, and of the client, beside the server's.
DOCKER_ARGUMENTS = {"BASE", "DEVICE", "EXTRAS", "TORCH_INDEX"}


def commands() -> list[list[str]]:
    """Every command of the console blocks, and every `atelier ...` within the text, as words."""
    blocks = re.findall(r"```console\n(.*?)```", OPERATIONS, re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    inline = re.findall(r"`(atelier [^`]+)`", re.sub(r"```.*?```", "", PAGES, flags=re.DOTALL))
    found = [shlex.split(part) for line in lines for part in re.split(r" \| ", line)]
    return found + [shlex.split(text.replace("\n", " ")) for text in inline]


def of(program: str) -> list[list[str]]:
    found = []
    for words in commands():
        if words[0] == program:
            end = words.index(">") if ">" in words else len(words)
            found.append(words[1:end])
    assert found
    return found


@pytest.mark.parametrize("words", of("atelier"), ids=" ".join)
def test_an_atelier_command_parses(words: list[str], tmp_path: Path) -> None:
    """Subcommands and flags are looked up by Click's own parser; the server's by the server's."""
    if words[0] == "serve":
        flags = [word for word in words[1:] if word not in ("--help", "--print-config")]
        assert read(flags, {"ATELIER_INSECURE": "true"})
        return
    command, name = get_command(cli), "atelier"
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    with contextlib.suppress(typer.Exit):
        command.make_context(name, list(words))


def test_a_wrong_flag_is_seen(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no-such-flag"):
        test_an_atelier_command_parses(["info", "--no-such-flag"], tmp_path)


def test_flags_in_the_text_exist() -> None:
    """`--like-this` in backquotes is one of the server's settings, or of the command line's."""
    told = set(re.findall(r"`(--[a-z][\w.-]+)`", PAGES))
    known = {setting.flag for setting in SETTINGS} | {"--config", "--print-config"}
    assert told - known == set()


def test_variables_and_settings_exist() -> None:
    told = set(re.findall(r"\bATELIER_[A-Z_]+\b", PAGES))
    assert told - {setting.variable for setting in SETTINGS} == set()


def test_a_tenants_quotas_are_the_servers() -> None:
    [block] = re.findall(r"```toml\n(.*?)```", OPERATIONS, re.DOTALL)
    for quotas in tomllib.loads(block)["tenant"].values():
        assert Quotas(**quotas) != Quotas()


def test_paths_and_make_targets_exist() -> None:
    paths = {word for words in commands() for word in words if word.startswith(("k8s/", "docs/", "./"))}
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    targets = re.findall(r"`make ([\w-]+)`", PAGES)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_what_kubectl_is_told_to_touch_exists() -> None:
    """statefulset/atelier and the like are in the manifests; the secrets are tested with them."""
    known = {
        f"{resource['kind'].lower()}/{resource['metadata']['name']}"
        for overlay in (ROOT / "k8s" / "overlays").iterdir()
        for resource in render(overlay)
    }
    told = {word for words in of("kubectl") for word in words if re.fullmatch(r"[a-z]+/[a-z-]+", word)}
    assert told - known - {"atelier/clients"} == set()
    assert "statefulset/atelier" in told


def test_build_arguments_are_the_dockerfiles() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE)) == DOCKER_ARGUMENTS
    told = {
        words[i + 1].split("=")[0]
        for words in of("docker")
        for i, w in enumerate(words)
        if w == "--build-arg"
    }
    assert told <= DOCKER_ARGUMENTS
    extras = re.findall(r'EXTRAS="([^"]+)"', OPERATIONS)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(
        re.search(rf"^{extra} = \[", project, re.MULTILINE) for text in extras for extra in text.split()
    )


def test_every_alert_has_its_entry() -> None:
    rules = yaml.safe_load((ROOT / "k8s" / "monitoring" / "prometheusrule.yaml").read_text(encoding="utf-8"))
    alerts = {
        rule["alert"] for group in rules["spec"]["groups"] for rule in group["rules"] if "alert" in rule
    }
    assert alerts == set(re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE))


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#h][^)#]*)", PAGES)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_the_table_of_sizes_is_fresh() -> None:
    block = re.search(r"<!-- sizing: .*? -->\n(.*?)<!-- end of sizing -->", OPERATIONS, re.DOTALL)
    assert block
    assert block[1].strip() == sizing.table(), "run `python -m benchmarks.sizing` and paste"
