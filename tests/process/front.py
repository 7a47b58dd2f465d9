"""`python -m tests.process.front`: the server as it is, with the contract tests' worker behind it."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from atelier_server.app import run
from atelier_server.config.reading import read
from tests.contract.harness import FAKE

if __name__ == "__main__":
    settings, _ = read(sys.argv[1:], os.environ)
    logging.basicConfig(level=settings.log_level.upper())
    asyncio.run(run(settings, FAKE))
