"""Otto, learned by every method on a real server with the embedded model, and looked at.

    python -m tests.process.otto methods SHEET.webp        # a row a method, and how much like Otto it is
    python -m tests.process.otto overfitting SHEET.webp    # the report's recipe: checkpoints by prompts

Likeness is against examples/otto-held-out: by colours (`atelier.cli.similarity`, which sees no shapes), and
by the scorer that ships with the model (cosine of its embeddings, which keep what its captions name: a figure
in patches is far from Otto, but any tidy blue octopus is nearly as near as his own other pictures, at .55).
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from atelier import Client
from atelier.cli.similarity import similarity
from atelier.events import CheckpointPublished
from atelier.fields import GenerateFields
from atelier.sheet import Layout, contact_sheet
from atelier.transfer import read_folder
from atelier_server import pocket
from pocket.scorer import Scorer
from tests.process.server import Server

EXAMPLES = Path("examples/otto")
PLAIN, SUBJECT = "a blue plush octopus", "a sks blue plush octopus"
SCENES = ("{} on a beach", "{} in the snow", "{} in a room")
SEEDS = (100, 101, 102, 103)
PAINTING = GenerateFields(num_inference_steps=20, guidance_scale=3.0)
_NEW_WORD: dict[str, Any] = {
    "placeholder_tokens": ["sks"],
    "initializer_token": "octopus",
    "token_lr": 2e-2,
}
_COMMON: dict[str, Any] = {
    "instance_prompt": SUBJECT,
    "train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "max_train_steps": 200,
    "checkpointing_steps": 200,
}
# What a figure is made of, and where, sits in the convolutions: attention alone paints it in patches.
_EVERYWHERE: dict[str, Any] = {"target_modules": ["attention", "feed_forward", "convolutions"]}
METHODS: Mapping[str, dict[str, Any]] = {
    "lora": _EVERYWHERE,
    "textual-inversion": {
        **_NEW_WORD,
        "method": "textual_inversion",
        "num_vectors": 4,
        "token_lr": 5e-3,
    },
    "pivotal": {
        **_NEW_WORD,
        **_EVERYWHERE,
        "method": "pivotal",
        "num_vectors": 4,
        "token_lr": 5e-3,
        "train_text_encoder_ti_frac": 0.25,
        "learning_rate": 2e-3,
    },
    "dreambooth": {"method": "dreambooth", "learning_rate": 2e-4, "rank": 16},
    "pivotal-dreambooth": {
        **_NEW_WORD,
        "method": "pivotal",
        "pivotal_method": "dreambooth",
        "num_vectors": 4,
        "token_lr": 1e-2,
        "train_text_encoder_ti_frac": 0.25,
        "learning_rate": 4e-4,
        "lr_scheduler": "constant",
        "rank": 32,
    },
    "lora-text": {**_EVERYWHERE, "train_text_encoder": True, "text_encoder_lr": 2e-4},
    "dora": {**_EVERYWHERE, "use_dora": True},
}
# The report's recipe, scaled to the embedded model: 15 pictures with one caption, batches of one, tokens for
# the first half of 1,500 steps, LoRA for the second.
ARTICLE: dict[str, Any] = {
    **_NEW_WORD,
    **_EVERYWHERE,
    "method": "pivotal",
    "instance_prompt": SUBJECT,
    "train_batch_size": 1,
    "num_vectors": 4,
    "token_lr": 5e-3,
    "learning_rate": 2e-3,
    "rank": 16,
    "max_train_steps": 1500,
    "checkpointing_steps": 250,
}
ARTICLE_PROMPTS = (
    "a 17th century painting in a golden frame of {}",
    "a sad {} in a room",
    "{} on a beach",
)


def teach(client: Client, name: str, recipe: Mapping[str, Any], *, captions: bool = True) -> list[str]:
    """The checkpoints that came of it."""
    images = read_folder(EXAMPLES)
    if not captions:
        images = [replace(image, caption="") for image in images]
    events = client.train(images=images, recipe={**_COMMON, **recipe, "name": name})
    return [event.adapter for event in events if isinstance(event, CheckpointPublished)]


def paint(client: Client, wanted: Sequence[tuple[str, str, int]]) -> list[bytes]:
    """Of (prompt, adapter or "", seed), all at once."""

    def one(prompt: str, adapter: str, seed: int) -> bytes:
        fields: GenerateFields = {**PAINTING, "seed": seed}
        return client.generate(prompt, adapters=[adapter] if adapter else [], **fields).images[0].data

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda each: one(*each), wanted))


@dataclass(frozen=True)
class Likeness:
    """Means over all pictures and references: `colours` 0 to 1, `scorer` -1 to 1."""

    colours: float
    scorer: float

    def __str__(self) -> str:
        return f"colours {self.colours:.3f}, scorer {self.scorer:.3f}"

    @classmethod
    def of(cls, painted: Sequence[bytes]) -> Likeness:
        scorer = Scorer(pocket.path() / "scorer")
        pictures, held_out = ([_opened(data) for data in some] for some in (painted, references()))
        return cls(
            similarity(painted, references()), float(scorer.image_similarity(pictures, held_out).mean())
        )


def looked_at(client: Client, adapter: str, subject: str) -> tuple[Likeness, list[bytes]]:
    """Over SCENES and SEEDS; and the pictures."""
    wanted = [(scene.format(subject), adapter, seed) for scene in SCENES for seed in SEEDS]
    painted = paint(client, wanted)
    return Likeness.of(painted), painted


def references() -> list[bytes]:
    return [path.read_bytes() for path in sorted(EXAMPLES.with_name("otto-held-out").glob("*.png"))]


def methods_sheet(client: Client) -> Image.Image:
    rows, labels = [], []
    before, painted = looked_at(client, "", PLAIN)
    rows.append(painted)
    labels.append(f"base model ({before.colours:.2f})")
    print(f"base: {before}", flush=True)
    for name, recipe in METHODS.items():
        [adapter] = teach(client, name, recipe)
        after, painted = looked_at(client, adapter, SUBJECT)
        print(f"{name}: {after}", flush=True)
        rows.append(painted)
        labels.append(f"{name} ({after.colours:.2f})")
    heads = [scene.format("...") for scene in SCENES for _ in SEEDS]
    return contact_sheet(rows, row_labels=labels, column_labels=heads, layout=_SMALL)


def overfitting_sheet(client: Client) -> Image.Image:
    checkpoints = teach(client, "otto", ARTICLE, captions=False)
    columns = [("", PLAIN), *((adapter, SUBJECT) for adapter in checkpoints)]
    rows, labels = [], []
    for prompt in ARTICLE_PROMPTS:
        for seed in SEEDS[:2]:
            rows.append(paint(client, [(prompt.format(subject), a, seed) for a, subject in columns]))
            labels.append(prompt.format("..."))
    for place, (adapter, _) in enumerate(columns):
        print(f"{adapter or 'base'}: {Likeness.of([row[place] for row in rows[2:]])}", flush=True)
    heads = ["base model", *(adapter for adapter in checkpoints)]
    return contact_sheet(rows, row_labels=labels, column_labels=heads, layout=_SMALL)


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


_SMALL = Layout(cell=112, gap=4, margin=12, label_size=13)
_SHEETS = {"methods": methods_sheet, "overfitting": overfitting_sheet}


def main(kind: str, output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "data").start()
        try:
            with Client(server.address) as client:
                sheet = _SHEETS[kind](client)
        finally:
            server.stop()
    stream = io.BytesIO()
    sheet.save(stream, "WEBP", quality=82, method=6)
    output.write_bytes(stream.getvalue())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
