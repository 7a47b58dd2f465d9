"""Certificate authorities of a test, and the PEM files of what they issue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme


@dataclass(frozen=True)
class Pair:
    """A certificate chain and its key."""

    cert: Path
    key: Path


class Authority:
    """`issue` puts new files in the place of old ones, as tools that rotate certificates do."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.file))

    def issue(self, *names: str, to: Path | None = None, **fields: Any) -> Pair:
        """For `names`; `to` is the folder of an earlier pair."""
        made = self._authority.issue_cert(*names, **fields)
        folder = to or self._folder / names[0]
        folder.mkdir(parents=True, exist_ok=True)
        pair = Pair(folder / "tls.crt", folder / "tls.key")
        chain = b"".join(pem.bytes() for pem in made.cert_chain_pems)
        for path, content in ((pair.cert, chain), (pair.key, made.private_key_pem.bytes())):
            temporary = path.with_suffix(".new")
            temporary.write_bytes(content)
            temporary.replace(path)
        return pair
