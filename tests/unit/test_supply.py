"""What we stand on: its licences are listed and known to be permissive, its bill of materials is valid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
SUPPLY = ROOT / ".ci" / "supply.py"
LISTED = dict(
    line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line
)
# Whole words of the licences that may be linked to from an Apache-2.0 service and shipped in its image.
PERMISSIVE = (
    "Apache",
    "BSD",
    "MIT",
    "ISC",
    "PSF",
    "Python Software Foundation",
    "MPL",
    "Zlib",
    "CNRI",
    "Unlicense",
)


def test_the_page_is_fresh() -> None:
    program = "import runpy; print(runpy.run_path('.ci/supply.py')['licences'](), end='')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == PAGE, "run `make licences`"


@pytest.mark.parametrize("name", sorted(set(LISTED) - {"distribution"}))
def test_every_licence_is_permissive(name: str) -> None:
    assert any(word in LISTED[name] for word in PERMISSIVE), LISTED[name]
    assert "GPL" not in LISTED[name]


def test_the_main_dependencies_are_listed() -> None:
    assert {"torch", "diffusers", "grpcio", "s3fs", "opentelemetry-sdk"} <= set(LISTED)
    assert "pytest" not in LISTED


@pytest.mark.soak
def test_the_bill_of_materials_is_valid(tmp_path: Path) -> None:
    """supply.py checks it against CycloneDX's schema; here, that it lists what the page lists."""
    subprocess.run([sys.executable, SUPPLY, "sbom", tmp_path / "sbom.json"], check=True)
    bill = json.loads((tmp_path / "sbom.json").read_text())
    names = {part["name"].lower().replace("_", "-") for part in bill["components"]}
    assert names == set(LISTED) - {"distribution"}
    assert all(part["version"] for part in bill["components"])
