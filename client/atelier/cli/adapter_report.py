"""What an import understood of a file, for people."""

from __future__ import annotations

from collections.abc import Iterator

from atelier.cli import output
from atelier.records import AdapterReport

_UNMATCHED_SHOWN = 10
_TOLD = (
    "ss_sd_model_name",
    "ss_base_model_version",
    "ss_steps",
    "ss_epoch",
    "ss_learning_rate",
    "ss_optimizer",
)
_TITLES = ("modelspec.title", "modelspec.author", "modelspec.date")


def show(report: AdapterReport) -> None:
    """Prints the report, a line a fact, what does not fit last."""
    for label, text in _facts(report):
        if text:
            output.out(f"  {label:<10} {text}")
    if report.unmatched:
        output.out(f"  {len(report.unmatched)} parts were left out ({report.coverage:.1%} fits):")
        for part in report.unmatched[:_UNMATCHED_SHOWN]:
            output.out(f"    {part.name}: {part.reason}")
        if (more := len(report.unmatched) - _UNMATCHED_SHOWN) > 0:
            output.out(f"    and {more} more (--json lists them all)")


def _facts(report: AdapterReport) -> Iterator[tuple[str, str]]:
    software = f", written by {report.software}" if report.software else ""
    yield "format", f"{report.format} ({report.confidence:.0%} of its tensors){software}"
    family = f"{report.family}: {report.evidence}" if report.family else "not told"
    yield "family", f"{family}; the base is {report.base_family}"
    kinds = ", ".join(f"{count.modules} {count.kind}" for count in report.kinds)
    yield "modules", f"{len(report.matched)} of the base ({kinds})" if report.matched else ""
    yield "rank", _counts((f"{c.rank}", c.modules) for c in report.ranks)
    yield "alpha", _counts((f"{c.alpha:g}", c.modules) for c in report.alphas)
    for token in report.tokens:
        vectors = f"{token.vectors} vector{'s' if token.vectors > 1 else ''}"
        yield "token", f"{token.placeholder} ({vectors} for {', '.join(token.encoders)})"
    yield "triggers", ", ".join(report.triggers)
    yield "change", ", ".join(f"{entry.block} {entry.norm:.3g}" for entry in report.norms)
    if report.probe is not None:
        yield "probe", _moves(report.probe)
    if report.difference_bytes:
        yield "cost", f"{output.size(report.difference_bytes)} on the device beside its slot"
    told = [f"{key} {report.metadata[key]}" for key in (*_TITLES, *_TOLD) if report.metadata.get(key)]
    yield "header", ", ".join(told)


def _moves(probe: float) -> str:
    if probe == 0:
        return "warning: this adapter does nothing, the U-Net's output stays as it is"
    return f"the U-Net's output moves by {probe:.1%}"


def _counts(pairs: Iterator[tuple[str, int]]) -> str:
    """ "8" where all have it, else "4 (x12), 8 (x36)"."""
    found = list(pairs)
    if len(found) == 1:
        return found[0][0]
    return ", ".join(f"{value} (x{modules})" for value, modules in found)
