"""`python -m pocket COMMAND`: the workshop of the embedded model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from pocket.examples import write_examples
from pocket.finetune import METHODS, before_and_after
from pocket.peers import joined, rank, wait
from pocket.stages import STAGES, Plan
from pocket.world import write_sheet


def main() -> None:
    arguments = _parser().parse_args()
    # Many small operations: threads beyond one wait for each other more than they help.
    torch.set_num_threads(arguments.threads)
    if arguments.command == "examples":
        write_examples(arguments.output, print)
    elif arguments.command == "sheet":
        print("\n".join(write_sheet(arguments.output, arguments.seed)))
    elif arguments.command == "finetune":
        _finetune(arguments)
    else:
        with joined():
            _stage(arguments)


def _stage(arguments: argparse.Namespace) -> None:
    plan = Plan(
        work=arguments.work,
        base=arguments.base,
        decoder_only=getattr(arguments, "decoder_only", False),
        minutes=arguments.minutes,
        max_steps=arguments.max_steps,
        pictures=arguments.pictures,
        held_out=arguments.held_out,
        painted=arguments.painted,
        sampling_steps=arguments.sampling_steps,
        workers=arguments.workers,
        batch_scale=arguments.batch_scale,
        learning_rate=arguments.learning_rate,
    )
    torch.manual_seed(0)
    figures = STAGES[arguments.command](plan, lambda line: print(line, file=sys.stderr, flush=True))
    wait()
    if rank():
        return
    _tell(figures, arguments.json)
    if not figures["gate"] and not arguments.below_gate:
        sys.exit(f"{arguments.command} stays below its gate; --below-gate goes on all the same")


def _finetune(arguments: argparse.Namespace) -> None:
    figures = before_and_after(
        arguments.model,
        arguments.method,
        examples=arguments.examples,
        output=arguments.output,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
    )
    _tell(figures, arguments.json)


def _tell(figures: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name}: {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pocket", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on a CPU")
    commands = parser.add_subparsers(dest="command", required=True)
    examples = commands.add_parser("examples", help="draw the example subjects into examples/")
    examples.add_argument("--output", type=Path, default=Path("examples"))
    sheet = commands.add_parser("sheet", help="draw a sheet of world pictures and print their captions")
    sheet.add_argument("--output", type=Path, default=Path("world.png"))
    sheet.add_argument("--seed", type=int, default=0)
    for name, summary in (
        ("text", "train tokenizer and text encoder"),
        ("vae", "train the VAE"),
        ("unet", "train the U-Net, then put the model together"),
        ("scorer", "train the scorer against the model's text encoder"),
        ("evaluate", "train the classifier and judge the model"),
    ):
        stage = commands.add_parser(name, help=summary)
        _add_stage_options(stage)
        if name == "vae":
            stage.add_argument("--decoder-only", action="store_true", help="leave the latents as they are")
    finetune = commands.add_parser("finetune", help="teach a model Otto and compare before and after")
    finetune.add_argument("method", choices=METHODS)
    finetune.add_argument("--model", type=Path, default=Path("server/atelier_server/pocket"))
    finetune.add_argument("--examples", type=Path, default=Path("examples"))
    finetune.add_argument("--output", type=Path, default=Path("build/pocket/finetune"))
    finetune.add_argument("--steps", type=int, default=400)
    finetune.add_argument("--learning-rate", type=float, help="instead of the method's own")
    finetune.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def _add_stage_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work", type=Path, default=Path("build/pocket"), help="where stages keep their files"
    )
    parser.add_argument("--from", dest="base", type=Path, help="a model's folder to start from")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long the stage trains")
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--pictures", type=int, default=16384, help="pictures to train on")
    parser.add_argument("--held-out", type=int, default=1024, help="true pictures to test on")
    parser.add_argument("--painted", type=int, default=256, help="pictures to generate for the evaluation")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures and batches")
    parser.add_argument("--batch-scale", type=int, default=1, help="batches so many times larger")
    parser.add_argument("--learning-rate", type=float, help="instead of the stage's own")
    parser.add_argument("--below-gate", action="store_true", help="do not fail below the gate")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


if __name__ == "__main__":
    main()
