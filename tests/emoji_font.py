"""A font of coloured bitmaps, made of pictures, as a file like NotoColorEmoji.ttf."""

import io

from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
from fontTools.ttLib.tables.E_B_L_C_ import BitmapSizeTable, SbitLineMetrics, Strike, eblc_index_sub_table_1
from PIL import Image


def write_font(path, pictures):
    """`pictures`: code points of an emoji -> its picture. Of several code points it is a ligature of glyphs."""
    characters = sorted({point for points in pictures for point in points if point != 0xFE0F})
    names = {point: f"u{point:04X}" for point in characters}
    bitmaps, rules = {}, []
    for i, (points, picture) in enumerate(pictures.items()):
        parts = [names[point] for point in points if point != 0xFE0F]
        name = parts[0] if len(parts) == 1 else f"ligature{i}"
        bitmaps[name] = picture
        rules += [f"sub {' '.join(parts)} by {name};"] if len(parts) > 1 else []
    glyphs = [".notdef", *names.values(), *(name for name in bitmaps if name.startswith("ligature"))]
    builder = FontBuilder(2048)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap(names)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (2550, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost()
    addOpenTypeFeaturesFromString(builder.font, f"feature ccmp {{ {' '.join(rules)} }} ccmp;")
    _add_bitmaps(builder.font, bitmaps)
    builder.font.save(path)


def _add_bitmaps(font, bitmaps):
    glyphs = {}
    for name in sorted(bitmaps, key=font.getGlyphID):
        glyph = glyphs[name] = cbdt_bitmap_format_17(b"", font)
        glyph.metrics, glyph.imageData = SmallGlyphMetrics(), _png(bitmaps[name])
        width, height = bitmaps[name].size
        vars(glyph.metrics).update(height=height, width=width, BearingX=0, BearingY=101, Advance=width)
    strike, places = Strike(), eblc_index_sub_table_1(b"", font)
    places.names, places.indexFormat, places.imageFormat = list(glyphs), 1, 17
    strike.indexSubTables, strike.bitmapSizeTable = [places], BitmapSizeTable()
    size = strike.bitmapSizeTable
    vars(size).update(colorRef=0, ppemX=109, ppemY=109, bitDepth=32, flags=1, hori=_line(), vert=_line())
    font["CBLC"], font["CBDT"] = newTable("CBLC"), newTable("CBDT")
    font["CBLC"].version = font["CBDT"].version = 3.0
    font["CBLC"].strikes, font["CBDT"].strikeData = [strike], [glyphs]


def _line():
    line = SbitLineMetrics()
    names = ("ascender", "descender", "widthMax", "caretSlopeNumerator", "caretSlopeDenominator", "caretOffset",
             "minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2")  # fmt: skip
    vars(line).update(dict.fromkeys(names, 0))
    return line


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()
