"""`atelier train`: an adapter from a folder of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from atelier.cli import flags, output
from atelier.cli.connection import again, connect
from atelier.events import (
    CheckpointPublished,
    Sample,
    TrainingAccepted,
    TrainingCompleted,
    TrainingEvent,
    TrainingProgress,
    TrainingRestarted,
    TrainingWarning,
)
from atelier.fields import RecipeFields
from atelier.recipe import RecipeError, dump, load
from atelier.transfer import read_folder

SamplesFolder = Annotated[
    Path | None, typer.Option("--samples", metavar="DIR", help="write the sample pictures there")
]


@flags.with_fields(RecipeFields, "Recipe")
def train(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="pictures; STEM.txt is a picture's caption")
    ] = None,
    *,
    name: Annotated[str | None, typer.Option(help="of the adapter")] = None,
    instance_prompt: Annotated[
        str | None, typer.Option(help='calls the subject up, e.g. "a sks plush octopus"')
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="TOML with any of these flags as keys; flags go first"),
    ] = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="show file and flags as one such file, and end")
    ] = False,
    no_captions: Annotated[
        bool, typer.Option("--no-captions", help="pay no heed to STEM.txt: the instance prompt for all")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="leave once the training is accepted")] = False,
    cancel_on_disconnect: Annotated[
        bool, typer.Option("--cancel-on-disconnect", help="stop the training when this command stops")
    ] = False,
    request_id: flags.RequestId = None,
    samples: SamplesFolder = None,
    server: flags.Server = flags.DEFAULT_SERVER,
    json: flags.Json = False,
    fields: dict[str, Any],
) -> None:
    """Teach the server a subject. Ctrl-C detaches; the training goes on."""
    flags_given = {"name": name, "instance_prompt": instance_prompt, **fields}
    values = _loaded(recipe) | {key: value for key, value in flags_given.items() if value is not None}
    if print_recipe:
        if json:
            output.print_json(values)
        else:
            output.out(dump(values).removesuffix("\n"))
        return
    if detach and cancel_on_disconnect:
        raise typer.BadParameter("would cancel the training at once", param_hint="--cancel-on-disconnect")
    if folder is None:
        raise typer.BadParameter("which pictures are to be learned?", param_hint="DIR")
    for key in ("name", "instance_prompt"):
        if key not in values:
            hint = f"--{key.replace('_', '-')}"
            raise typer.BadParameter("missing here and in the recipe", param_hint=hint)
    with connect(server) as client:
        client.server_info()  # a wrong address is told at once, not after the time for reconnecting
        images = [
            replace(image, caption="" if no_captions else image.caption) for image in read_folder(folder)
        ]
        events = client.train(
            images=images,
            recipe=values,
            request_id=request_id,
            cancel_on_disconnect=cancel_on_disconnect,
        )
        follow(events, server, json=json, samples=samples, detach=detach, cancels=cancel_on_disconnect)


def _loaded(path: Path | None) -> dict[str, Any]:
    """The recipe of a file; exit code 2 with a line for each thing that is wrong."""
    try:
        return load(path)
    except RecipeError as error:
        for problem in error.problems:
            output.say(f"error: {problem}")
        raise typer.Exit(2) from None


def follow(
    events: Iterator[TrainingEvent],
    server: str,
    *,
    json: bool,
    samples: Path | None,
    detach: bool = False,
    cancels: bool = False,
    training: str = "",
) -> None:
    """Prints events until the last, or until Ctrl-C or `detach` leaves the training to itself.

    `cancels`: leaving it stops it.
    """
    try:
        with output.Steps("training", quiet=json) as steps:
            for event in events:
                training = event.training
                saved = _save(event, samples)
                if json:
                    output.print_json(output.training_event(event, **saved))
                else:
                    _tell(event, steps, saved)
                if detach and isinstance(event, TrainingAccepted):
                    break
            else:
                return
    except KeyboardInterrupt:
        if not training:
            output.say("stopped before the training was accepted")
            raise typer.Exit(1) from None
    watch = f"atelier trainings watch {training}{again(server)}"
    told = "the training is cancelled; what it learned is kept" if cancels else "the training goes on"
    output.say(f"{'stopped' if cancels else 'detached'}; {told}. To see it again: {watch}")


def _save(event: TrainingEvent, samples: Path | None) -> dict[str, str]:
    """Writes a sample picture where the user wants them; {"path": ...} if it did."""
    if samples is None or not isinstance(event, Sample):
        return {}
    samples.mkdir(parents=True, exist_ok=True)
    suffix = event.mime_type.rpartition("/")[2]
    return {"path": str(event.save(samples / f"step-{event.step:06d}-{event.index}.{suffix}"))}


def _checkpoint(event: CheckpointPublished) -> str:
    words = [f"checkpoint {event.adapter}", f"loss {event.loss:.4f}"]
    if event.validation_loss is not None:
        words.append(f"validation loss {event.validation_loss:.4f}")
    if event.kept_share is not None:
        words.append(f"keeps {event.kept_share:.1%} of the change")
    return "  ".join([*words, output.size(event.size_bytes)])


def _tell(event: TrainingEvent, steps: output.Steps, saved: dict[str, str]) -> None:
    match event:
        case TrainingAccepted():
            time = output.duration(event.estimated_seconds) if event.estimated_seconds else "unknown"
            memory = output.size(event.estimated_bytes) if event.estimated_bytes else "unknown"
            output.out(f"training {event.training} of {event.adapter}@v{event.version}")
            output.out(f"estimate: {time}, memory {memory}")
        case TrainingProgress():
            left = output.duration(event.seconds_left)
            steps.update(event.step, event.max_train_steps, f"loss {event.loss:.4f}  {left} left")
        case CheckpointPublished():
            output.out(_checkpoint(event))
        case Sample() if saved:
            output.out(f"sample {saved['path']}  {event.prompt}")
        case TrainingWarning():
            output.say(f"warning: {event.reason}: {event.message}")
        case TrainingRestarted():
            output.say(f"restarted from step {event.from_step} ({event.reason})")
        case TrainingCompleted():
            words = f"{event.state} after {event.step} steps, {output.duration(event.seconds)}"
            output.out(f"{words}: {event.adapter}" if event.adapter else words)
