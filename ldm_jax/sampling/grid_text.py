"""The text of image grids in any script: each character in the first installed font that has it.

ASCII is in Pillow's own font; Latin, Greek, Cyrillic and more in DejaVu Sans, which matplotlib brings; other scripts in
the fonts of the system, Noto's first. A character that no font has is shown by its code, as in Python.
"""

import importlib.util
import itertools
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/System/Library/Fonts",
           "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts")  # fmt: skip
STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "mono", "condensed", "serif", "color")  # the last
ELLIPSIS = "..."
Runs = list[tuple[str, ImageFont.FreeTypeFont]]  # pieces of a text, each in one font


def layout(text: str, size: int, limit: float) -> Runs:
    """A text on one line in fonts of `size` pixels, cut with an ellipsis to a width of at most `limit` pixels."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    runs = _runs(text, size)
    if length(runs) <= limit:
        return runs
    kept, cut = 0, len(text)  # binary search: the first fits, the second does not
    while cut - kept > 1:
        middle = (kept + cut) // 2
        fits = length(_runs(text[:middle].rstrip() + ELLIPSIS, size)) <= limit
        kept, cut = (middle, cut) if fits else (kept, middle)
    return _runs(text[:kept].rstrip(" \u200d") + ELLIPSIS, size)


def length(runs: Runs) -> float:
    """The width of a text in pixels."""
    return sum(font.getlength(text) for text, font in runs)


def draw_text(draw: ImageDraw.ImageDraw, right: int, middle: int, runs: Runs, ink: int | tuple[int, ...]) -> None:
    """Draws a text that ends at `right` and whose first font is centred at `middle`."""
    if len(runs) == 1:
        draw.text((right, middle), runs[0][0], fill=ink, font=runs[0][1], anchor="rm")
    elif runs:
        ascent, descent = runs[0][1].getmetrics()
        x = right - length(runs)
        for text, font in runs:
            draw.text((x, middle + (ascent - descent) // 2), text, fill=ink, font=font, anchor="ls")
            x += font.getlength(text)


def _runs(text: str, size: int) -> Runs:
    """The text in one font if one has it all, else in pieces."""
    text = "".join(_escape(c) if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    if text.isascii():
        return [(text, _font(None, size))]
    needed = {character for character in text if not _ignorable(character)}
    whole = next((path for path in _candidates() if needed <= _characters(path)), None)
    if whole:
        return [(text, _font(whole, size))]
    pieces = [(character, _path_of(character)) for character in text]
    shown = [(_escape(c) if path == "" else c, path or None) for c, path in pieces if path != "" or not _ignorable(c)]
    groups = itertools.groupby(shown, key=lambda piece: piece[1])
    return [("".join(character for character, _ in group), _font(path, size)) for path, group in groups]


def _path_of(character: str) -> str | None:
    """The first font file with a character; None: Pillow's own font; "": none has it."""
    if character.isascii():
        return None
    return next((path for path in _candidates() if character in _characters(path)), "")


def _ignorable(character: str) -> bool:
    """Whether a character is no glyph: a variation selector, a joiner, a mark of direction."""
    return unicodedata.category(character) == "Cf" or 0xFE00 <= ord(character) <= 0xFE0F


def _escape(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode() if ord(character) > 31 else repr(character)[1:-1]


@cache
def _font(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@cache
def _files() -> tuple[str, ...]:
    """The font files in the order of preference."""
    found: Iterable[Path] = (
        path
        for folder in FOLDERS
        for path in sorted(Path(folder).expanduser().rglob("*"))
        if path.suffix.lower() in (".ttf", ".otf", ".ttc")
    )
    system = sorted(found, key=lambda path: (_style(path.stem), not path.stem.startswith("Noto"), path.name))
    matplotlib = importlib.util.find_spec("matplotlib")
    bundled = Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if matplotlib else None
    return tuple(str(path) for path in [bundled, *system] if path and path.is_file())


def _style(name: str) -> int:
    return sum(style in name.lower() for style in STYLES)


def _candidates() -> Iterator[str]:
    return (path for path in _files() if _characters(path))


@cache
def _characters(path: str) -> frozenset[str]:
    """The characters of a font; none of a damaged one, or one of coloured bitmaps, which have one size."""
    from fontTools.ttLib import TTFont

    try:
        with Path(path).open("rb") as file, TTFont(file, lazy=True, fontNumber=0) as font:
            if "CBDT" in font or "sbix" in font:
                return frozenset()
            return frozenset(map(chr, font.getBestCmap() or ()))
    except Exception:  # damaged fonts raise nearly all
        return frozenset()
