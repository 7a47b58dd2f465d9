"""What an installation of atelier[server,s3,otel] consists of, from the metadata of what is installed here.

`licences` writes docs/licences.md, `sbom FILE` a CycloneDX list of the same distributions. The accelerator
libraries that torch's CUDA wheels require are named in words, not listed: another build comes without them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
EXTRAS = ("server", "s3", "otel")
# CUDA's parts come with one build of torch and not with another.
ACCELERATOR = ("nvidia-", "cuda-", "triton")
HEAD = """# Licences

What an installation of `atelier[server,s3,otel]` consists of, by the metadata of the distributions themselves
(`make licences` writes this page, a test keeps it fresh). Atelier itself is Apache-2.0.

**The embedded model** `pocket` is Apache-2.0. It was trained on pictures of this project's own code and of
two sets of emoji, whose licences lie beside it:
[Fluent Emoji, MIT](../server/atelier_server/pocket/licenses/fluent-emoji-MIT.txt),
[Noto Emoji, Apache-2.0](../server/atelier_server/pocket/licenses/noto-emoji-Apache-2.0.txt).
[NOTICE](../NOTICE) says what was taken, [its card](../server/atelier_server/pocket/MODEL_CARD.md) how it was
made. Base models that you name by `--model` have licences of their own.

**torch for CUDA** brings NVIDIA's libraries (distributions named `nvidia-*`) under NVIDIA's own terms, and
Triton (MIT); they are not listed below, because another build of torch comes without them.

| distribution | licence |
|---|---|
"""


def closure() -> list[str]:
    """Canonical names of everything that the extras require on this machine, but for the project itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = [
        *project["dependencies"],
        *(need for extra in EXTRAS for need in project["optional-dependencies"][extra]),
    ]
    found: set[str] = set()
    waiting: list[tuple[list[str], tuple[str, ...]]] = [(own, ())]
    while waiting:
        needs, extras = waiting.pop()
        for need in map(Requirement, needs):
            wanted = need.marker is None or any(
                need.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            )
            required = canonicalize_name(need.name)
            if wanted and required not in found and not required.startswith(ACCELERATOR):
                found.add(required)
                waiting.append((distribution(required).requires or [], tuple(need.extras)))
    return sorted(found)


def licences() -> str:
    """The page: one line a distribution."""
    names = closure()
    command = [BIN / "pip-licenses", "--from=mixed", "--format=json", "--with-system", "--packages", *names]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    licence = {canonicalize_name(entry["Name"]): entry["License"] for entry in told}
    return HEAD + "".join(f"| {name} | {' '.join(licence[name].split())} |\n" for name in names)


def sbom() -> str:
    """CycloneDX, JSON; raises ValueError if it does not meet the schema."""
    command = [BIN / "cyclonedx-py", "environment", "--pyproject", str(ROOT / "pyproject.toml")]
    command += ["--spec-version", "1.6", "--output-reproducible", str(BIN / "python")]
    bill = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    kept = set(closure())
    bill["components"] = [part for part in bill["components"] if canonicalize_name(part["name"]) in kept]
    known = {part["bom-ref"] for part in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    bill["dependencies"] = [
        {**edge, "dependsOn": [ref for ref in edge.get("dependsOn", ()) if ref in known]}
        for edge in bill["dependencies"]
        if edge["ref"] in known
    ]
    text = json.dumps(bill, indent=2) + "\n"
    if fault := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(fault)
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["licences"]:
        (ROOT / "docs" / "licences.md").write_text(licences(), encoding="utf-8")
    elif sys.argv[1:2] == ["sbom"] and len(sys.argv) == 3:
        target = Path(sys.argv[2])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(sbom(), encoding="utf-8")
    else:
        sys.exit("usage: supply.py licences | sbom FILE")
