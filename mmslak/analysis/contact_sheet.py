"""Many pictures as one, in a grid, with their names and the colours of the classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

WIDTH = 2000  # pixels of a sheet at most
LARGE, SMALL = 240, 116  # pixels of a picture's longer side, in sheets of few and of many
MANY = 64
GAP, LINE = 8, 18  # pixels between pictures, and of a line of text


def contact_sheet(
    parts: Mapping[str, Sequence[tuple[str, Path]]],
    legend: Mapping[str, Sequence[int]] | None = None,
) -> Image.Image:
    """Draws a contact sheet.

    Args:
        parts: By their headings, names and files of the pictures.
        legend: Names of classes with their colours (red, green, blue), for the bottom.

    Returns:
        A picture in RGB, at most 2000 pixels wide.
    """
    longest = max(len(cells) for cells in parts.values())
    side = LARGE if sum(map(len, parts.values())) <= MANY else SMALL
    columns = max(1, min(WIDTH // (side + GAP), longest))
    rows = []  # (row of drawn pictures, or a heading)
    for heading, cells in parts.items():
        rows.append(heading)
        drawn = [(name, _small(path, side)) for name, path in cells]
        rows += [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    heights = [
        LINE * 2 if isinstance(row, str) else max(p.height for _, p in row) + LINE + GAP
        for row in rows
    ]
    names = list(legend or {})
    width = max(columns, 2) * (side + GAP) + GAP
    per_line = max(1, (width - GAP) // (LARGE + GAP))
    height = sum(heights) + LINE * -(-len(names) // per_line) + 2 * GAP

    sheet = Image.new('RGB', (width, height), 'white')
    draw, font = ImageDraw.Draw(sheet), _font()
    top = GAP
    for row, step in zip(rows, heights):
        if isinstance(row, str):
            draw.text((GAP, top + GAP), row, 'black', font)
        else:
            for i, (name, picture) in enumerate(row):
                left = GAP + i * (side + GAP)
                sheet.paste(picture, (left, top))
                draw.text((left, top + picture.height), _fitting(name, side, font), 'black', font)
        top += step
    for i, name in enumerate(names):
        left, y = GAP + i % per_line * (LARGE + GAP), top + i // per_line * LINE
        colour = tuple(int(value) for value in legend[name])
        draw.rectangle((left, y + 3, left + 12, y + 15), colour, 'black')
        draw.text((left + LINE, y), _fitting(name, LARGE - LINE, font), 'black', font)
    return sheet


def _small(path: Path, side: int) -> Image.Image:
    with Image.open(path) as file:
        return ImageOps.contain(file.convert('RGB'), (side, side))


def _font() -> ImageFont.FreeTypeFont:
    """The font of matplotlib, which has letters of many scripts and is there with it."""
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), 'fonts/ttf/DejaVuSans.ttf')), size=13
    )


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """A text, cut so that it is not wider than some pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + '…') > width:
        text = text[:-1]
    return text + '…'
