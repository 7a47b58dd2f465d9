"""`atelier demo`: starts a server, teaches it Otto, paints him, leaves a contact sheet and a report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer

from atelier.cli import output
from atelier.cli.local_server import LocalServer, need_server
from atelier.cli.report import Findings, render
from atelier.cli.similarity import similarity
from atelier.client import Client
from atelier.errors import AtelierError
from atelier.events import (
    CheckpointPublished,
    GenerationResult,
    Sample,
    TrainingAccepted,
    TrainingProgress,
)
from atelier.fields import GenerateFields
from atelier.recipe import load
from atelier.records import TrainingImage
from atelier.sheet import contact_sheet
from atelier.transfer import read_folder

ADAPTER = "otto"
SHEET_SEED = 7
SIMILARITY_SEEDS = range(100, 108)
INFERENCE_STEPS = 30
# The small embedded model burns its colours at the usual 7.5.
PAINTING = GenerateFields(num_inference_steps=INFERENCE_STEPS, guidance_scale=4.0)
CONCURRENT_CALLS = 8
MARKER = ".atelier-demo"


def demo(
    *,
    out: Annotated[
        Path, typer.Option("--output", help="folder for the pictures, the report and the data")
    ] = Path("demo"),
    model: Annotated[str, typer.Option(help="hub id, folder, .safetensors, or pocket")] = "pocket",
    examples: Annotated[
        Path, typer.Option(help="pictures to learn from; held-out ones in DIR-held-out")
    ] = Path("examples/otto"),
    recipe: Annotated[Path, typer.Option(help="how to learn; TOML")] = Path(
        "examples/recipes/otto-pocket.toml"
    ),
    max_train_steps: Annotated[int | None, typer.Option(min=3, help="rather than the recipe's")] = None,
) -> None:
    """Start a server, teach it a subject, paint it, and leave a contact sheet and a report."""
    need_server()
    images = read_folder(examples)
    held_out = read_folder(examples.with_name(f"{examples.name}-held-out"))
    values = _recipe(recipe, max_train_steps)
    findings = Findings(_subject(images, values), values, PAINTING)
    data_dir = _fresh_data_dir(out)
    server = LocalServer(data_dir, out / "server.log", model=model)
    begun = time.monotonic()
    try:
        with server, Client(server.address) as client:
            output.say(f"server on {server.address}, log in {out / 'server.log'}")
            server.wait_ready(client)
            findings.info = client.server_info()
            findings.seconds["start"] = time.monotonic() - begun
            _learn(client, findings, images)
            _paint(client, findings, out)
            _measure(client, findings, held_out)
    except (AtelierError, OSError) as error:
        output.say(f"error: {error}")
        for line in server.last_lines():
            output.say(f"  | {line}")
        raise typer.Exit(1) from error
    findings.seconds["all"] = time.monotonic() - begun
    (out / "report.html").write_text(render(findings), encoding="utf-8")
    _tell(findings, out)


def _recipe(path: Path, max_train_steps: int | None) -> dict[str, Any]:
    """The file's, as a new version of the demo's adapter; other steps have a checkpoint each third."""
    values = {**load(path), "name": ADAPTER, "new_version": True}
    if max_train_steps is not None:
        values |= {"max_train_steps": max_train_steps, "checkpointing_steps": -(-max_train_steps // 3)}
    return values


def _subject(images: Sequence[TrainingImage], recipe: Mapping[str, Any]) -> str:
    """The words that all captions begin with; without captions, the instance prompt."""
    captions = [image.caption.split() for image in images if image.caption]
    shared = takewhile(lambda words: len(set(words)) == 1, zip(*captions, strict=False))
    return " ".join(words[0] for words in shared) or str(recipe["instance_prompt"])


def _fresh_data_dir(out: Path) -> Path:
    """An empty data folder: a demo's of before is removed, anybody else's is not touched (ValueError)."""
    data_dir = out / "data"
    if data_dir.exists():
        if not (data_dir / MARKER).is_file():
            raise ValueError(f"{data_dir} was not made by a demo; choose another --output")
        shutil.rmtree(data_dir)
    data_dir.mkdir(parents=True)
    (data_dir / MARKER).touch()
    return data_dir


def _learn(client: Client, findings: Findings, images: list[TrainingImage]) -> None:
    begun = time.monotonic()
    events = client.train(images=images, recipe=findings.recipe)
    with output.Steps(f"teaching {ADAPTER}") as steps:
        for event in events:
            match event:
                case TrainingAccepted(estimated_seconds=seconds) if seconds:
                    output.say(f"estimate: {output.duration(seconds)}")
                case TrainingProgress():
                    findings.training.append(event)
                    steps.update(event.step, event.max_train_steps, f"loss {event.loss:.4f}")
                case CheckpointPublished():
                    findings.checkpoints.append(event)
                case Sample():
                    findings.samples.append(event)
    findings.seconds["training"] = time.monotonic() - begun


def _paint(client: Client, findings: Findings, out: Path) -> None:
    """The contact sheet: prompts by checkpoints, the same seed everywhere, all calls at once."""
    begun = time.monotonic()
    adapters = ["", *(checkpoint.adapter for checkpoint in findings.checkpoints)]
    prompts = scenes(findings.prompt)
    wanted = [(prompt, adapter, SHEET_SEED) for prompt in prompts for adapter in adapters]
    pictures = [result.images[0].data for result in _generate(client, wanted, "painting")]
    rows = [pictures[start : start + len(adapters)] for start in range(0, len(pictures), len(adapters))]
    sheet = contact_sheet(
        rows,
        row_labels=prompts,
        column_labels=["base model", *adapters[1:]],
        title=f"{ADAPTER}, learned from {findings.prompt!r}",
    )
    sheet.save(out / "contact-sheet.png")
    findings.sheet = (out / "contact-sheet.png").read_bytes()
    findings.seconds["contact sheet"] = time.monotonic() - begun


def scenes(subject: str) -> list[str]:
    """Prompts that put the subject where its pictures did not show it."""
    article, _, rest = subject.partition(" ")
    return [
        f"{subject} on a beach",
        f"{subject} in the snow",
        f"a 17th century painting of {subject}",
        f"{article} sad {rest}" if article in ("a", "an", "the") else f"sad {subject}",
    ]


def _measure(client: Client, findings: Findings, held_out: list[TrainingImage]) -> None:
    """The subject's colours against pictures not learned from; base and adapter at the same seeds."""
    begun = time.monotonic()
    wanted = [
        (findings.prompt, adapter, seed)
        for adapter in ("", findings.checkpoints[-1].adapter)
        for seed in SIMILARITY_SEEDS
    ]
    pictures = [result.images[0].data for result in _generate(client, wanted, "measuring")]
    references = [image.data for image in held_out]
    half = len(SIMILARITY_SEEDS)
    findings.similarity_base = similarity(pictures[:half], references)
    findings.similarity_adapter = similarity(pictures[half:], references)
    findings.seconds["similarity"] = time.monotonic() - begun


def _generate(client: Client, wanted: Sequence[tuple[str, str, int]], what: str) -> list[GenerationResult]:
    """One call each of (prompt, adapter or "", seed), concurrently: the server batches them."""

    def one(prompt: str, adapter: str, seed: int) -> GenerationResult:
        chosen = [adapter] if adapter else []
        fields: GenerateFields = {**PAINTING, "seed": seed}
        return client.generate(prompt, adapters=chosen, **fields)

    with ThreadPoolExecutor(CONCURRENT_CALLS) as pool, output.Steps(what) as steps:
        calls = [pool.submit(one, *each) for each in wanted]
        results = []
        for done, call in enumerate(calls, 1):
            results.append(call.result())
            steps.update(done, len(calls))
    return results


def _tell(findings: Findings, out: Path) -> None:
    base, adapter = findings.similarity_base, findings.similarity_adapter
    count = len(SIMILARITY_SEEDS)
    output.out(f"closeness to held-out pictures (colours, mean over {count} seeds, 1 is equal):")
    output.out(f"  base model {base:.3f}, {findings.checkpoints[-1].adapter} {adapter:.3f}")
    output.out(f"done in {output.duration(findings.seconds['all'])}; look at")
    output.out(f"  {out / 'contact-sheet.png'}")
    output.out(f"  {out / 'report.html'}")
