"""The images in a font of coloured bitmaps: Noto Color Emoji, in Debian's package fonts-noto-color-emoji.

A sequence of code points (a flag, a skin tone, a family) is shaped as by a text layout engine, with the font's
character map and the ligatures of its substitution table (OpenType 1.9, `cmap`, `GSUB` lookup type 4); the image is
then read from the table of bitmaps (`CBDT`). So it is the same on every machine, pixel for pixel; Pillow renders
sequences only with a further library.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ldm_jax.data.images import decode, on_background
from ldm_jax.data.prepare import in_one_line
from ldm_jax.errors import InputError

BITMAP = (136, 128)  # width and height; the outer columns are the space between two emoji
SIZE = 128
EMOJI_STYLE = 0xFE0F  # variation selector: show the character as an emoji, as this font does anyway


class EmojiFont(NamedTuple):
    """A font, read by `read_font`."""

    path: Path
    glyphs: Mapping[int, str]  # code point -> name of the glyph
    ligatures: Mapping[tuple[str, ...], str]  # names of two glyphs or more -> name of the one that replaces them
    bitmaps: Mapping[str, Any]  # name of a glyph -> its bitmap of fontTools


def read_font(path: Path) -> EmojiFont:
    """The font in a file; InputError if it is no font, a damaged one, or one without coloured bitmaps."""
    from fontTools.ttLib import TTFont

    with in_one_line(f"{path} is damaged, or no font"):
        font = TTFont(io.BytesIO(path.read_bytes()), lazy=True)
    missing = [table for table in ("cmap", "GSUB", "CBLC", "CBDT") if table not in font]
    if missing:
        raise InputError(
            f"{path} has no {' and no '.join(missing)}: it must be a font of bitmaps such as Debian's "
            "fonts-noto-color-emoji"
        )
    with in_one_line(f"{path} is damaged, or no font"):
        unknown = font.getGlyphOrder()[0]  # the box for missing characters
        glyphs = {point: name for point, name in font.getBestCmap().items() if name != unknown}
        return EmojiFont(path, glyphs, _ligatures(font["GSUB"].table), font["CBDT"].strikeData[0])


def render(font: EmojiFont, points: tuple[int, ...]) -> Image.Image | None:
    """The image of a sequence of code points on white, RGB, 128 x 128; None if the font has no single glyph for it.

    Raises InputError if the font is damaged or has bitmaps of another size.
    """
    names = tuple(font.glyphs.get(point) for point in points if point != EMOJI_STYLE)
    name = names[0] if len(names) == 1 else font.ligatures.get(names)
    if name not in font.bitmaps:
        return None
    with in_one_line(f"{font.path} is damaged: the bitmap of {name} cannot be read"):
        image = decode(font.bitmaps[name].imageData)
    if image.size != BITMAP:
        raise InputError(
            f"{font.path} has a bitmap of {image.width} x {image.height} pixels ({name}); "
            f"those of Noto Color Emoji are {BITMAP[0]} x {BITMAP[1]}"
        )
    left = (BITMAP[0] - SIZE) // 2
    cropped = image.convert("RGBA").crop((left, 0, left + SIZE, SIZE))
    return on_background(cropped, "white").convert("RGB")


def _ligatures(substitutions: Any) -> dict[tuple[str, ...], str]:
    """All ligatures; of two for the same glyphs the font's first."""
    found: dict[tuple[str, ...], str] = {}
    for lookup in substitutions.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    found.setdefault((first, *ligature.Component), ligature.LigGlyph)
    return found
