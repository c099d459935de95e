"""Drawing a sample: all of its frames on one sheet, and the same as an animation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mvd_fast.files import written_aside
from mvd_fast.names import printable

COLUMNS = 8
MARGIN, GAP, LINE, LABEL = 16, 4, 22, 22  # pixels
LEAST_WIDTH = 720  # room for the text
TITLE, TEXT, SMALL = 16, 14, 13  # sizes of the font
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class Page:
    """What is drawn. `panels`, name -> uint8 [T, H, W, 3], are views of the same T frames."""

    title: str
    lines: list[str]
    frames: list[int]  # their numbers in the file [T]
    panels: dict[str, np.ndarray]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        height, width = next(iter(self.panels.values())).shape[1:3]
        return height, width

    @property
    def columns(self) -> int:
        return min(COLUMNS, len(self.frames))

    @property
    def width(self) -> int:
        """Of the sheet between its margins."""
        return max(LEAST_WIDTH, self.columns * (self.size[1] + GAP) - GAP)

    @property
    def row_height(self) -> int:
        return LABEL + len(self.panels) * (self.size[0] + GAP)

    def text(self) -> list[tuple[str, int, tuple[int, int, int]]]:
        """The lines above the frames, each as wide as the sheet at most, with size and colour."""
        lines = [(line, TITLE, INK) for line in _wrapped(self.title, TITLE, self.width)]
        for line in self.lines:
            lines += [(part, TEXT, INK) for part in _wrapped(line, TEXT, self.width)]
        if len(self.panels) > 1:
            lines.append((f"from above: {', '.join(self.panels)}", TEXT, FAINT))
        return lines

    def corner(self, position: int, panel: int) -> tuple[int, int]:
        """Where a frame of a panel lies on the sheet: x, y of its upper left corner."""
        row, column = divmod(position, self.columns)
        top = MARGIN + LINE * len(self.text()) + row * self.row_height + LABEL
        return MARGIN + column * (self.size[1] + GAP), top + panel * (self.size[0] + GAP)


def write_sheet(page: Page, path: Path) -> None:
    """A PNG: the text, then rows of frames, their numbers above them and the panels one below the other."""
    rows = -(-len(page.frames) // page.columns)
    height = MARGIN + LINE * len(page.text()) + rows * page.row_height + MARGIN
    sheet = Image.new("RGB", (page.width + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (line, size, colour) in enumerate(page.text()):
        draw.text((MARGIN, MARGIN + number * LINE), line, colour, _font(size))
    for position, frame in enumerate(page.frames):
        x, y = page.corner(position, 0)
        draw.text((x, y - LABEL + 4), f"frame {frame}", FAINT, _font(SMALL))
        for number, panel in enumerate(page.panels.values()):
            sheet.paste(Image.fromarray(panel[position]), page.corner(position, number))
    with written_aside(path) as aside:
        sheet.save(aside)


def write_animation(page: Page, path: Path, milliseconds: int) -> None:
    """A lossless WebP that repeats for ever: the panels side by side, the frame's number below them."""
    pictures = [_beside(page, position) for position in range(len(page.frames))]
    with written_aside(path) as aside:
        pictures[0].save(
            aside,
            save_all=True,
            append_images=pictures[1:],
            duration=milliseconds,
            loop=0,
            lossless=True,
            exact=True,
            method=0,  # the quickest
        )


def _beside(page: Page, position: int) -> Image.Image:
    height, width = page.size
    picture = Image.new("RGB", (len(page.panels) * (width + GAP) - GAP, height + LABEL), PAPER)
    for number, panel in enumerate(page.panels.values()):
        picture.paste(Image.fromarray(panel[position]), (number * (width + GAP), 0))
    ImageDraw.Draw(picture).text((2, height + 2), f"frame {page.frames[position]}", INK, _font(SMALL))
    return picture


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrapped(text: str, size: int, width: int) -> list[str]:
    """Lines of `width` pixels at most, split at spaces where there are some."""
    lines = [""]
    for word in printable(text).split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if _font(size).getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = lines[-1] or word
        while _font(size).getlength(lines[-1]) > width:
            fitting = _fitting(lines[-1], size, width)
            lines[-1:] = [lines[-1][:fitting], lines[-1][fitting:]]
    return lines


def _fitting(word: str, size: int, width: int) -> int:
    """How many signs of a word fit into `width` pixels."""
    return max(1, next(n for n in range(len(word), 0, -1) if n == 1 or _font(size).getlength(word[:n]) <= width))
