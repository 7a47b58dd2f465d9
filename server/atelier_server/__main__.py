"""`python -m atelier_server`: settings from flags and ATELIER_* variables, then one server."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from atelier_server.app import StartError, run
from atelier_server.config import Limits, Settings
from atelier_server.errors import AtelierError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 drained, 1 could not start, 2 bad settings (all of them are told)."""
    problems: list[str] = []
    limits = Limits.model_construct()
    try:
        limits = Limits()
    except ValidationError as error:
        problems += _problems(error, "ATELIER_LIMIT_")
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        settings = Settings(_cli_parse_args=arguments, limits=limits)  # type: ignore[call-arg]
    except ValidationError as error:
        problems += _problems(error, "ATELIER_")
    if problems:
        print("\n".join(["atelier: bad settings", *problems]), file=sys.stderr)
        return 2
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        asyncio.run(run(settings))
    except (StartError, AtelierError) as error:
        print(f"atelier: {error}", file=sys.stderr)
        return 1
    return 0


def _problems(error: ValidationError, prefix: str) -> list[str]:
    """One line a problem: its flag, its variable, what is wrong, what was given."""
    lines = []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        name = "_".join(path)
        flag = ".".join(path).replace("_", "-")
        shown = repr(item["input"])[:100]
        lines.append(f"  --{flag} ({prefix}{name.upper()}): {item['msg']}; got {shown}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
