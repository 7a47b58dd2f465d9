"""`python -m atelier_server`: settings from flags, ATELIER_* variables and a file, then one server."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from atelier_server import logs
from atelier_server.app import run
from atelier_server.config.printed import as_toml
from atelier_server.config.reading import BadSettings, read, wants_print
from atelier_server.errors import AtelierError, StartError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 drained, 1 could not start, 2 bad settings (all of them are told)."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        settings, given = read(arguments, os.environ)
    except BadSettings as error:
        print(
            "atelier: bad settings",
            *(f"  {problem}" for problem in error.problems),
            sep="\n",
            file=sys.stderr,
        )
        return 2
    if wants_print(arguments):
        print(as_toml(settings, given), end="")
        return 0
    logs.configure(settings.log_format, settings.log_level, "front")
    try:
        asyncio.run(run(settings))
    except StartError as error:
        print(*(f"atelier: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return 1
    except AtelierError as error:
        print(f"atelier: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
