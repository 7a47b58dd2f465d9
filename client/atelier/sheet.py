"""Contact sheets: a labelled grid of pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAPER = (250, 250, 248)
INK = (34, 34, 40)
FAINT = (228, 228, 224)


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes in pixels. A cell is square; a picture is scaled to fit and centred in it."""

    cell: int = 192
    gap: int = 10
    margin: int = 28
    label_size: int = 17
    title_size: int = 24


def contact_sheet(
    rows: Sequence[Sequence[bytes | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
    layout: Layout | None = None,
) -> Image.Image:
    """An RGB picture of the grid. `rows` hold picture files; None leaves an empty frame.

    Column labels are centred above their columns, row labels stand left of their rows, `captions` under
    their cells, wrapped. ValueError if there is no cell at all.
    """
    sizes = layout or Layout()
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("a contact sheet needs at least one picture")
    label, heading = _font(sizes.label_size), _font(sizes.title_size)
    line, heading_line = round(sizes.label_size * 1.35), round(sizes.title_size * 1.35)
    under = [[wrap(_broken(text, label, sizes.cell), label, sizes.cell) for text in row] for row in captions]
    foot = max((len(text) for row in under for text in row), default=0) * line
    pitch = sizes.cell + sizes.gap
    row_pitch = pitch + foot
    left = sizes.margin + (_row_label_width(row_labels, label, sizes) if any(row_labels) else 0)
    width = left + columns * pitch - sizes.gap + sizes.margin
    titles = wrap(title, heading, width - 2 * sizes.margin) if title else []
    heads = [wrap(text, label, sizes.cell) for text in column_labels]
    top = sizes.margin + len(titles) * heading_line + (sizes.gap if titles else 0)
    head_height = max((len(head) for head in heads), default=0) * line
    first = top + head_height + (sizes.gap if head_height else 0)
    sheet = Image.new("RGB", (width, first + len(rows) * row_pitch - sizes.gap + sizes.margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(titles):
        draw.text((sizes.margin, sizes.margin + number * heading_line), text, INK, heading)
    for column, head in enumerate(heads):
        centre = left + column * pitch + sizes.cell // 2
        _centred(draw, head, (centre, top + head_height - len(head) * line), label, line)
    for number, row in enumerate(rows):
        y = first + number * row_pitch
        if number < len(row_labels):
            _row_label(
                draw,
                row_labels[number],
                (sizes.margin, y),
                right=left - 2 * sizes.gap,
                font=label,
                sizes=sizes,
            )
        for column, data in enumerate(row):
            at = (left + column * pitch, y)
            _place(sheet, draw, data, at, sizes.cell)
            if number < len(under) and column < len(under[number]):
                _centred(
                    draw, under[number][column], (at[0] + sizes.cell // 2, y + sizes.cell + 2), label, line
                )
    return sheet


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    with Image.open(io.BytesIO(data)) as picture:
        return picture.size


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _broken(text: str, font: Font, width: int) -> str:
    """`text` with words that are wider than `width` cut into pieces."""
    words = []
    for word in text.split():
        rest = word
        while font.getlength(rest) > width and len(rest) > 1:
            fits = max(n for n in range(1, len(rest)) if n == 1 or font.getlength(rest[:n]) <= width)
            words.append(rest[:fits])
            rest = rest[fits:]
        words.append(rest)
    return " ".join(words)


def _centred(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], font: Font, line: int
) -> None:
    """Lines below one another, the first with the middle of its top at `at`."""
    for number, text in enumerate(lines):
        draw.text((at[0], at[1] + number * line), text, INK, font, anchor="ma")


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _row_label_width(labels: Sequence[str], font: Font, sizes: Layout) -> int:
    """As wide as the widest label, but at most a cell: longer ones wrap."""
    return min(round(max(font.getlength(text) for text in labels)), sizes.cell) + 2 * sizes.gap


def _row_label(
    draw: ImageDraw.ImageDraw, text: str, at: tuple[int, int], *, right: int, font: Font, sizes: Layout
) -> None:
    """Centred vertically beside its row."""
    line = round(sizes.label_size * 1.35)
    lines = wrap(text, font, right - at[0])
    y = at[1] + (sizes.cell - len(lines) * line) // 2
    for number, words in enumerate(lines):
        draw.text((at[0], y + number * line), words, INK, font)


def _place(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, data: bytes | None, at: tuple[int, int], cell: int
) -> None:
    if data is None:
        draw.rectangle((*at, at[0] + cell - 1, at[1] + cell - 1), FAINT)
        return
    with Image.open(io.BytesIO(data)) as picture:
        scale = min(cell / picture.width, cell / picture.height)
        size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
        scaled = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    sheet.paste(scaled, (at[0] + (cell - size[0]) // 2, at[1] + (cell - size[1]) // 2))
