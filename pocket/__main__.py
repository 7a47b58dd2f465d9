"""`python -m pocket COMMAND`: the workshop of the embedded model."""

from __future__ import annotations

import argparse
from pathlib import Path

from pocket.examples import write_examples
from pocket.world import write_sheet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pocket", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    examples = commands.add_parser("examples", help="draw the example subjects into examples/")
    examples.add_argument("--output", type=Path, default=Path("examples"))
    sheet = commands.add_parser("sheet", help="draw a sheet of world pictures and print their captions")
    sheet.add_argument("--output", type=Path, default=Path("world.png"))
    sheet.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.command == "examples":
        write_examples(arguments.output, print)
    else:
        print("\n".join(write_sheet(arguments.output, arguments.seed)))


if __name__ == "__main__":
    main()
