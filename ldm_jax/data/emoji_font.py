"""The pictures in a font of coloured bitmaps: Noto Color Emoji, in Debian's package fonts-noto-color-emoji.

The picture of a sequence of code points (a flag, a skin tone, a family) is found as a text layout engine finds it: by
the font's character map and the ligatures of its substitution table (OpenType 1.9, `cmap`, `GSUB` lookup type 4), then
taken as it is from the table of bitmaps (`CBDT`). So it is the same on every machine, pixel for pixel; Pillow draws
sequences only where it finds a library for that.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ldm_jax.data.images import decode
from ldm_jax.errors import InputError

BITMAP = (136, 128)  # width and height; the outer columns are the space between two emoji
SIZE = 128
EMOJI_STYLE = 0xFE0F  # says that a character is to be shown as a picture, which this font does anyway


class EmojiFont(NamedTuple):
    """A font, read by `read_font`.

    Fields:
      path: of its file.
      glyphs: code point -> name of the glyph.
      ligatures: names of two glyphs or more -> name of the one that takes their place.
      bitmaps: name of a glyph -> what fontTools knows of its bitmap.
    """

    path: Path
    glyphs: Mapping[int, str]
    ligatures: Mapping[tuple[str, ...], str]
    bitmaps: Mapping[str, Any]


def read_font(path: Path) -> EmojiFont:
    """The font in a file.

    Raises:
      InputError: the file is no font, a damaged one, or one without coloured bitmaps.
    """
    from fontTools.ttLib import TTFont

    try:
        font = TTFont(io.BytesIO(path.read_bytes()), lazy=True)
        missing = [table for table in ("cmap", "GSUB", "CBLC", "CBDT") if table not in font]
        if missing:
            raise InputError(
                f"{path} has no {' and no '.join(missing)}: it must be a font of bitmaps such as Debian's "
                "fonts-noto-color-emoji has"
            )
        unknown = font.getGlyphOrder()[0]  # the box that stands for what the font does not have
        glyphs = {point: name for point, name in font.getBestCmap().items() if name != unknown}
        return EmojiFont(path, glyphs, _ligatures(font["GSUB"].table), font["CBDT"].strikeData[0])
    except InputError:
        raise
    except Exception as error:  # a damaged font can raise nearly anything
        raise InputError(f"{path} is damaged, or no font: {_reason(error)}") from error


def draw(font: EmojiFont, points: tuple[int, ...]) -> Image.Image | None:
    """The picture of a sequence of code points on white, RGB, 128 x 128; None if the font has no single glyph for it.

    Raises:
      InputError: the font is damaged, or has bitmaps of another size.
    """
    names = tuple(font.glyphs.get(point) for point in points if point != EMOJI_STYLE)
    name = names[0] if len(names) == 1 else font.ligatures.get(names)
    if name not in font.bitmaps:
        return None
    try:
        image = decode(font.bitmaps[name].imageData)
    except Exception as error:  # as above: bitmaps are read when they are asked for
        raise InputError(f"{font.path} is damaged: the bitmap of {name} cannot be read: {_reason(error)}") from error
    if image.size != BITMAP:
        raise InputError(
            f"{font.path} has a bitmap of {image.width} x {image.height} pixels ({name}); "
            f"those of Noto Color Emoji are {BITMAP[0]} x {BITMAP[1]}"
        )
    left = (BITMAP[0] - SIZE) // 2
    image = image.convert("RGBA").crop((left, 0, left + SIZE, SIZE))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _ligatures(substitutions: Any) -> dict[tuple[str, ...], str]:
    """All of them; of two for the same glyphs the font's first."""
    found: dict[tuple[str, ...], str] = {}
    for lookup in substitutions.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    found.setdefault((first, *ligature.Component), ligature.LigGlyph)
    return found


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
