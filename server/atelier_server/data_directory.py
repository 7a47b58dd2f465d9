"""The server's folder: made, locked while the process lives, and of a version that this server knows."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from pathlib import Path

from atelier_server.errors import StartError

# 0 had no version.json; 1 is the same layout, with it; 2 has the adapters of `adapters.store`.
VERSION = 2


class DataDirectory:
    """Raises StartError if it cannot be written, was written by a later server, or is in use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StartError(f"--data-dir: {path} cannot be written: {error.strerror}") from None
        try:
            self._open()
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self) -> None:
        try:
            # The lock belongs to the process: killed or crashed, the next server starts at once.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"another server is using the data directory {self.path}") from None
        if (found := self._version()) > VERSION:
            raise StartError(
                f"--data-dir: {self.path} has version {found}, written by a later server; this one knows "
                f"{VERSION}: start the later server, or restore a backup that an earlier one wrote"
            )
        if found < VERSION:
            try:
                self._write("version.json", {"version": VERSION})
            except OSError as error:
                raise StartError(f"--data-dir: {self.path} cannot be written: {error.strerror}") from None

    def _version(self) -> int:
        path = self.path / "version.json"
        try:
            return int(json.loads(path.read_text())["version"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StartError(f"--data-dir: {path} cannot be read: {error}") from None

    @property
    def identity(self) -> str:
        """What tells this server from others that use the same store; made once."""
        path = self.path / "identity"
        if not path.exists():
            temporary = path.with_suffix(".part")
            temporary.write_text(uuid.uuid4().hex)
            temporary.replace(path)
        return path.read_text().strip()

    def announce(self, **facts: int | None) -> None:
        """Writes server.json, where tests and tools find the ports and processes."""
        self._write("server.json", facts)

    def close(self) -> None:
        (self.path / "server.json").unlink(missing_ok=True)
        os.close(self._lock)

    def _write(self, name: str, content: object) -> None:
        temporary = self.path / f"{name}.part"
        temporary.write_text(json.dumps(content) + "\n")
        temporary.replace(self.path / name)
