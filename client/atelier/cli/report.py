"""The demo's report: one HTML file without anything outside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atelier.cli import output
from atelier.cli.curve import loss_curve
from atelier.events import CheckpointPublished, Sample, TrainingProgress
from atelier.fields import GenerateFields
from atelier.records import ServerInfo

STYLE = """
:root { color-scheme: light dark; --paper: #fafaf8; --card: #fff; --ink: #22222a; --soft: #6b6b76;
  --line: #e4e4df; --accent: #2563c9; }
@media (prefers-color-scheme: dark) { :root { --paper: #15161a; --card: #1e2026; --ink: #ececf0;
  --soft: #9a9ba6; --line: #33353d; --accent: #7db0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: clamp(1.6rem, 5vw, 2.4rem); line-height: 1.15; margin: 0 0 .4rem; letter-spacing: -.02em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
p { margin: .4rem 0; } .soft, figcaption, th { color: var(--soft); }
img { display: block; max-width: 100%; height: auto; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1rem; }
.sheet { padding: 0; overflow: hidden; margin-top: 1.4rem; } .sheet img { width: 100%; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0; }
.numbers b { display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem; }
figure { margin: 0; } figure img { width: 100%; border-radius: 10px; image-rendering: auto; }
figcaption { font-size: .82rem; line-height: 1.35; margin-top: .35rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; font-weight: 400; padding: .35rem .8rem .35rem 0; vertical-align: top;
  border-top: 1px solid var(--line); } td { overflow-wrap: anywhere; } tr:first-child > * { border-top: 0; }
th { width: 1%; padding-right: 1.6rem; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } .grid { stroke: var(--line); }
.mark { stroke: var(--soft); stroke-dasharray: 3 4; } polyline { fill: none; stroke: var(--accent); }
.every { opacity: .3; } .mean { stroke-width: 2.5; }
"""


@dataclass(slots=True)
class Findings:
    """What a demo has to show, filled as it goes. Times are seconds by the name of the phase."""

    prompt: str
    recipe: Mapping[str, Any]
    painting: GenerateFields
    info: ServerInfo | None = None
    training: list[TrainingProgress] = field(default_factory=list)
    checkpoints: list[CheckpointPublished] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    sheet: bytes = b""
    similarity_base: float = 0.0
    similarity_adapter: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


def render(findings: Findings) -> str:
    """The whole page."""
    curve = loss_curve(
        [(event.step, event.loss) for event in findings.training],
        [checkpoint.step for checkpoint in findings.checkpoints],
    )
    body = [
        f"<h1>Teaching “{html.escape(findings.prompt)}”</h1>",
        '<p class="soft">A subject learned from a handful of pictures, then painted in new scenes: '
        "the base model beside an early, a middle and the last checkpoint, all from the same seed.</p>",
        _numbers(findings),
        f'<div class="card sheet"><img alt="contact sheet" src="{_uri(findings.sheet, "image/png")}"></div>',
        f'<h2>Loss</h2><div class="card">{curve}</div>',
        '<p class="soft">By training step: every value faintly, its running mean, checkpoints dashed.</p>',
        f'<h2>Samples along the training</h2><div class="samples">{_samples(findings.samples)}</div>',
        f'<h2>Settings</h2><div class="card">{_table(_settings(findings))}</div>',
        f'<h2>Where the time went</h2><div class="card">{_table(_times(findings))}</div>',
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Atelier demo: {html.escape(findings.prompt)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _numbers(findings: Findings) -> str:
    final = findings.checkpoints[-1]
    cards = [
        (f"{findings.similarity_base:.3f}", "closeness of the base model to held-out pictures"),
        (f"{findings.similarity_adapter:.3f}", f"closeness of {final.adapter}, same seeds"),
        (output.duration(findings.seconds["training"]), f"for {final.step} training steps"),
        (output.size(final.size_bytes), "adapter file"),
    ]
    inner = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span class="soft">{html.escape(text)}</span></div>'
        for value, text in cards
    )
    note = (
        "Closeness: mean intersection of the hue, saturation and value histograms of the saturated pixels "
        "in the middle of the pictures, over 8 seeds; 1 is equal. It measures colours, not shape."
    )
    return f'<div class="numbers">{inner}</div><p class="soft">{note}</p>'


def _samples(samples: list[Sample]) -> str:
    return "".join(
        f'<figure><img alt="{html.escape(sample.prompt)}" src="{_uri(sample.data, sample.mime_type)}">'
        f"<figcaption>step {sample.step}: {html.escape(sample.prompt)}</figcaption></figure>"
        for sample in sorted(samples, key=lambda sample: (sample.index, sample.step))
    )


def _settings(findings: Findings) -> list[tuple[str, str]]:
    rows = [(name, _words(value)) for name, value in {**findings.recipe, **findings.painting}.items()]
    if findings.info is not None:
        base, device = findings.info.base_model, findings.info.device
        rows.append(("base model", f"{base.reference} ({base.family}, {base.num_parameters / 1e6:.1f} M)"))
        rows.append(("device", f"{device.name}, {device.dtype}, {device.description}"))
        rows.append(("versions", ", ".join(f"{name} {v}" for name, v in findings.info.versions.items())))
    return rows


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _times(findings: Findings) -> list[tuple[str, str]]:
    return [(phase, output.duration(seconds)) for phase, seconds in findings.seconds.items()]


def _table(rows: list[tuple[str, str]]) -> str:
    inner = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows
    )
    return f"<table>{inner}</table>"


def _uri(data: bytes, mime_type: str) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(data).decode('ascii')}"
