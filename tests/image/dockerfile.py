"""A Dockerfile followed without a container engine: each stage is a folder, each RUN a chroot into it.

Knows what our Dockerfile uses: FROM, ARG, ENV, WORKDIR, RUN, COPY, USER, and what only describes the image.
No layers, no cache, and a RUN shares the machine's network; anything else is refused. Needs root.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

DESCRIBING = {"EXPOSE", "VOLUME", "STOPSIGNAL", "ENTRYPOINT", "HEALTHCHECK"}
# $0 is the root; its /run holds what the builder's settings point to, and is gone with the namespace.
ENTER = """
mount --bind /proc "$0/proc" && mount --rbind /dev "$0/dev" && mount -t tmpfs run "$0/run"
mount --bind /etc/resolv.conf "$0/etc/resolv.conf"
for pair in $MOUNTS; do
  source=${pair%%:*} target=$0${pair#*:}
  if test -d "$source"; then mkdir -p "$target"; else touch "$target"; fi
  mount --bind "$source" "$target"
done
exec chroot "$0" /usr/bin/env -i "$@"
"""


@dataclass(frozen=True)
class Image:
    """One stage as it stands: its root folder and what a container of it would start with."""

    root: Path
    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    workdir: str = "/"
    user: str = "0:0"
    described: Mapping[str, str] = field(default_factory=dict)

    def command(self, instruction: str) -> list[str]:
        """The exec form of ENTRYPOINT or HEALTHCHECK. Raises ValueError for the shell form."""
        text = self.described[instruction]
        words: list[str] = json.loads(text[text.index("[") :])
        return words


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Every instruction with its argument; continued lines are joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        name, _, rest = line.strip().partition(" ")
        yield name.upper(), rest.strip()


class Builder:
    """Follows one Dockerfile. `bases` are the roots that its outer FROM lines mean, by image name."""

    def __init__(
        self,
        *,
        context: Path,
        workspace: Path,
        base: Path,
        arguments: Mapping[str, str],
        mounts: Mapping[Path, str],
        settings: Mapping[str, str],
    ) -> None:
        self._context, self._workspace, self._base = context, workspace, base
        self._arguments, self._mounts, self._settings = dict(arguments), mounts, settings
        self._globals: dict[str, str] = {}
        self._stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
        self._built: dict[str, Image] = {}
        body: list[tuple[str, str]] | None = None
        for name, rest in instructions((context / "Dockerfile").read_text(encoding="utf-8")):
            if name == "FROM":
                image, stage = re.split(r"\s+AS\s+", rest)
                body = []
                self._stages[stage] = (image, body)
            elif body is None:
                self._globals |= self._argument(rest)
            else:
                body.append((name, rest))

    def build(self, stage: str) -> Image:
        """The image of a stage, after those it stands on."""
        if stage in self._built:
            return self._built[stage]
        source, body = self._stages[stage]
        source = expand(source, self._globals)
        below = self.build(source) if source in self._stages else Image(self._base)
        root = self._workspace / stage
        subprocess.run(["cp", "-a", "--reflink=auto", below.root, root], check=True)
        image, arguments = replace(below, root=root), dict[str, str]()
        for name, rest in body:
            print(f"{stage}: {name} {rest[:150]}", flush=True)
            if name == "ARG":
                arguments |= self._argument(rest)
            else:
                image = self._follow(image, name, rest, arguments)
        self._built[stage] = image
        return image

    def _argument(self, text: str) -> dict[str, str]:
        name, _, default = text.partition("=")
        return {name: self._arguments.get(name, default)}

    def _follow(self, image: Image, name: str, rest: str, arguments: Mapping[str, str]) -> Image:
        known = {**arguments, **image.environment}
        if name == "RUN":
            self._run(image, rest, arguments)
        elif name == "COPY":
            self._copy(image, expand(rest, known))
        elif name == "ENV":
            pairs = (word.split("=", 1) for word in shlex.split(expand(rest, known)))
            return replace(image, environment={**image.environment, **dict(pairs)})
        elif name == "WORKDIR":
            (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            return replace(image, workdir=rest)
        elif name == "USER":
            return replace(image, user=rest)
        elif name in DESCRIBING:
            return replace(image, described={**image.described, name: rest})
        else:
            raise ValueError(f"this follower does not know {name}")
        return image

    def _run(self, image: Image, command: str, arguments: Mapping[str, str]) -> None:
        environment = {**image.environment, **arguments, **self._settings}
        script = f"cd {image.workdir} && {command}"
        subprocess.run(
            [
                *("unshare", "--mount", "--propagation", "private", "sh", "-ec", ENTER, str(image.root)),
                *(f"{key}={value}" for key, value in environment.items()),
                *("/bin/sh", "-c", script),
            ],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "MOUNTS": self._mount_words()},
            check=True,
        )

    def _mount_words(self) -> str:
        return " ".join(f"{source}:{target}" for source, target in self._mounts.items())

    def _copy(self, image: Image, text: str) -> None:
        *sources, target = text.split()
        origin = self._context
        if sources[0].startswith("--from="):
            origin = self.build(sources.pop(0).removeprefix("--from=")).root
        else:
            unknown = set(sources) - self._sent()
            assert not unknown, f".dockerignore leaves out {unknown}"
        for source in sources:
            found, into = origin / source.lstrip("/"), image.root / target.lstrip("/")
            if found.is_dir():
                ignore = shutil.ignore_patterns("__pycache__") if origin == self._context else None
                shutil.copytree(found, into, symlinks=True, ignore=ignore, dirs_exist_ok=True)
            else:
                into.mkdir(parents=True, exist_ok=True) if target.endswith("/") else None
                shutil.copy2(found, into)

    def _sent(self) -> set[str]:
        """The names that .dockerignore lets into the build context."""
        lines = (self._context / ".dockerignore").read_text(encoding="utf-8").splitlines()
        return {line[1:] for line in lines if line.startswith("!")}


def expand(text: str, values: Mapping[str, str]) -> str:
    """`${NAME}` by its value; an unknown name is empty, as in a Dockerfile."""
    return re.sub(r"\$\{(\w+)\}", lambda match: values.get(match[1], ""), text)
