"""The image, built by following the Dockerfile in a plain Debian root, and its server in a read-only root.

`make image-test` runs it: it needs root, debootstrap, Debian's packages and pip's index, and takes minutes.
DEVICE=cuda builds the larger image; TORCH_INDEX is what a user would pass, else an index is made of what this
machine's pip finds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.dockerfile import Builder, Image
from tests.unit.k8s.kustomize import identity, render

pytestmark = [pytest.mark.image, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
DEVICE = os.environ.get("DEVICE", "cpu")
EXTRAS = "server s3 otel"
RELEASE = "bookworm"  # what BASE in the Dockerfile is a point release of
FORBIDDEN = ("gcc", "cc", "make", "pip", "pip3", "git", "curl", "wget")
# What the pod of the overlay cpu-dev is told.
[CONFIG_MAP] = [
    resource["data"]
    for resource in render(ROOT / "k8s" / "overlays" / "cpu-dev")
    if identity(resource) == ("ConfigMap", "atelier")
]
# PID 1 of a namespace of its own, on a root that cannot be written, with a data volume and a /tmp.
CONTAINER = """
mount --bind "$0" "$0" && mount --rbind /dev "$0/dev"
mount --bind "$DATA" "$0/data" && mount -t tmpfs tmp "$0/tmp" && mount -t proc proc "$0/proc"
mount -o remount,bind,ro "$0"
exec chroot --userspec="$RUN_AS" "$0" /usr/bin/env -i "$@"
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        pytest.fail("the image was NOT built: it needs root and debootstrap (apt-get install debootstrap)")
    return tmp_path_factory.mktemp("image")


@pytest.fixture(scope="module")
def image(workspace: Path) -> Iterator[Image]:
    base = workspace / "base"
    subprocess.run(["debootstrap", "--variant=minbase", RELEASE, base], check=True, stdout=subprocess.DEVNULL)
    arguments, mounts, settings = {"DEVICE": DEVICE, "EXTRAS": EXTRAS}, dict[Path, str](), dict[str, str]()
    if DEVICE == "cpu":
        arguments["TORCH_INDEX"] = os.environ.get("TORCH_INDEX") or "file:///run/torch-index"
        mounts[torch_index(workspace / "index")] = "/run/torch-index"
    if certificates := os.environ.get("PIP_CERT"):
        mounts[Path(certificates)] = settings["PIP_CERT"] = "/run/certificates.pem"
    builder = Builder(
        context=ROOT,
        workspace=workspace,
        base=base,
        arguments=arguments,
        mounts=mounts,
        settings=settings,
    )
    yield builder.build("image")
    shutil.rmtree(workspace)


def torch_index(folder: Path) -> Path:
    """A package index of one wheel: the torch that this machine's pip installs."""
    page = folder / "torch"
    page.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "torch", "--dest", str(page)]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt")], check=True)
    [wheel] = page.glob("*.whl")
    (page / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    return folder


class Container:
    """The image's ENTRYPOINT, run as the image says; `data` is its volume."""

    def __init__(self, image: Image, data: Path, *options: str) -> None:
        self._image = image
        self._variables = {**image.environment, **CONFIG_MAP}
        user, group = (int(part) for part in image.user.split(":"))
        data.mkdir()
        os.chown(data, user, group)
        self._process = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"),
                *("sh", "-ec", CONTAINER, str(image.root), *self._environment()),
                *image.command("ENTRYPOINT"),
                *options,
            ],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DATA": str(data), "RUN_AS": image.user},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline()

    def _environment(self) -> list[str]:
        return [f"{key}={value}" for key, value in self._variables.items()]

    @property
    def pid(self) -> int:
        """PID 1 of the container, as this machine numbers it."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command inside, as the image's user: what `docker exec` does."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--root", "--wd"]
        words = [
            *inside,
            f"--setuid={self._image.user.split(':')[0]}",
            f"--setgid={self._image.user.split(':')[1]}",
        ]
        words += ["/usr/bin/env", "-i", *self._environment(), *command]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)

    def stop(self) -> int:
        """SIGTERM to PID 1; the exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self._process.wait(timeout=120)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def container(image: Image, workspace: Path) -> Iterator[Container]:
    ports = ("--port", "0", "--metrics-port", "0", "--health-port", "0")  # the network is this machine's
    options = (*ports, "--host", "127.0.0.1", "--threads", "1")
    running = Container(image, workspace / "data", *options)
    assert running.said.startswith("atelier listening on 127.0.0.1:"), running.said
    yield running
    running.kill()


@pytest.fixture(scope="module")
def server(container: Container) -> str:
    return container.said.split()[3]


def test_no_build_tool_is_inside(image: Image) -> None:
    folders = ("usr/local/bin", "usr/bin", "opt/atelier/bin", "app/bin")
    assert [
        f"{folder}/{name}"
        for folder in folders
        for name in FORBIDDEN
        if (image.root / folder / name).exists()
    ] == []


def test_the_extras_are_inside(container: Container) -> None:
    done = container.run("python", "-c", "import opentelemetry.sdk.trace, s3fs")
    assert done.returncode == 0, done.stderr


def test_it_serves_and_paints(container: Container, server: str) -> None:
    done = container.run(
        "atelier", "generate", "a red ball", "--seed", "7", "--server", server, "-o", "/tmp/ball.png"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert container.run("atelier", "info", "--server", server).returncode == 0


def test_the_server_is_pid_1_and_nobody_special(container: Container) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{container.pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert status["NSpid"].split()[-1] == "1"
    assert set(status["Uid"].split()) == {"65532"}
    assert b"atelier_server" in Path(f"/proc/{container.pid}/cmdline").read_bytes()


def test_only_the_volume_and_tmp_can_be_written(container: Container) -> None:
    for folder in ("/app", "/opt/atelier", "/etc", "/"):
        done = container.run("sh", "-c", f"echo x > {folder}/x")
        assert "Read-only file system" in done.stderr or "Permission denied" in done.stderr
    done = container.run("python", "-c", "import json; json.dump({}, open('/data/x', 'w'))")
    assert done.returncode == 0, done.stderr


def test_its_health_check_passes(container: Container, image: Image) -> None:
    done = container.run(*image.command("HEALTHCHECK"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_sigterm_ends_it_with_0(container: Container, server: str) -> None:
    assert json.loads(container.run("atelier", "info", "--json", "--server", server).stdout)
    assert container.stop() == 0
