"""What a wheel of the project holds, and that without an extra it asks for no torch. Needs no network."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.test_architecture import SOURCES, imports

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "scipy", "sqlalchemy"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    options = ["--disable-pip-version-check", "--quiet", "--wheel-dir", str(folder)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def test_it_holds_both_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"atelier", "atelier_server"}


@pytest.mark.parametrize(
    "name",
    [
        "atelier/__init__.py",
        "atelier/v1/generation_pb2.pyi",
        "atelier_server/__init__.py",
        "atelier_server/pocket/model_index.json",
        "atelier_server/pocket/scheduler/scheduler_config.json",
        "atelier_server/pocket/scorer/model.safetensors",
        "atelier_server/pocket/scorer/processor_config.json",
        "atelier_server/pocket/text_encoder/model.safetensors",
        "atelier_server/pocket/tokenizer/tokenizer.json",
        "atelier_server/pocket/unet/diffusion_pytorch_model.safetensors",
        "atelier_server/pocket/vae/diffusion_pytorch_model.safetensors",
        "atelier_server/pocket/MODEL_CARD.md",
        "atelier_server/pocket/licenses/fluent-emoji-MIT.txt",
        "atelier_server/pocket/licenses/noto-emoji-Apache-2.0.txt",
    ],
)
def test_it_holds(wheel: zipfile.ZipFile, name: str) -> None:
    assert wheel.getinfo(name).filename == name


def test_it_holds_every_module_of_the_source(wheel: zipfile.ZipFile) -> None:
    source = {
        str(path.relative_to(ROOT / folder))
        for folder, package in (("client", "atelier"), ("server", "atelier_server"))
        for path in (ROOT / folder / package).rglob("*.py")
    }
    assert source <= set(wheel.namelist())


def test_licence_and_notice_are_inside(wheel: zipfile.ZipFile) -> None:
    licences = {name.rsplit("/", 1)[-1] for name in wheel.namelist() if ".dist-info/licenses/" in name}
    assert licences >= {"LICENSE", "NOTICE"}


def test_no_extra_means_no_torch(metadata: Message) -> None:
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    always = {r.name.lower() for r in required if r.marker is None or r.marker.evaluate({"extra": ""})}
    server = {r.name.lower() for r in required if r.marker and r.marker.evaluate({"extra": "server"})}
    assert always & HEAVY == set()
    assert server >= HEAVY


def test_the_command_is_installed(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert "atelier = atelier.cli:main" in wheel.read(name).decode()


def test_every_pinned_requirement_is_constrained() -> None:
    """Each direct dependency has a pin in the constraints file, so an install is the same tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    direct = {Requirement(text).name.lower() for text in [*project["dependencies"], *chain(*extras.values())]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert direct - {"atelier"} - pinned == set()


def test_no_committed_file_names_a_package_index() -> None:
    lock = (ROOT / "tests" / "node" / "package-lock.json").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "resolved" not in lock
    assert "://" not in constraints


@pytest.mark.parametrize(
    ("packages", "asked"),
    [
        (("atelier", "atelier_server"), ("server", "s3", "otel")),
        (("benchmarks", "pocket"), ("server", "bench", "dev")),
    ],
)
def test_every_import_is_of_a_declared_dependency(packages: tuple[str, ...], asked: tuple[str, ...]) -> None:
    """An environment in which something else brought it hides what is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needs = [*project["dependencies"], *(need for name in asked for need in extras[name])]
    declared = {canonicalize_name(Requirement(text).name) for text in needs}
    owners = packages_distributions()
    undeclared = {
        f"{found.module} imports {top}"
        for found in imports()
        if found.module.split(".")[0] in packages
        and not found.typing_only
        and (top := found.target.split(".")[0]) not in {*sys.stdlib_module_names, *SOURCES, "IPython"}
        and not declared & {canonicalize_name(name) for name in owners.get(top, ())}
    }
    assert undeclared == set()
