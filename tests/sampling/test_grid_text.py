"""The labels of grids: scripts, fonts, long texts."""

import unicodedata

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from ldm_jax.sampling import grid_text
from ldm_jax.sampling.grid_text import layout, length
from ldm_jax.sampling.image_grids import GAP, INK, grid


@pytest.fixture(autouse=True)
def no_system_fonts(monkeypatch, tmp_path):
    monkeypatch.setattr(grid_text, "FOLDERS", (str(tmp_path),))
    grid_text._files.cache_clear()
    yield
    grid_text._files.cache_clear()


def write_font(path, characters):
    """A font with a square for each of the characters."""
    names = [f"u{ord(character):x}" for character in characters]
    pen = TTGlyphPen(None)
    for point, move in zip(((0, 0), (0, 700), (700, 700), (700, 0)), (pen.moveTo, *[pen.lineTo] * 3)):
        move(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(map(ord, characters), names)))
    builder.setupGlyf(dict.fromkeys([".notdef", *names], square))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def texts(text, limit=1000):
    """The pieces of a text with their fonts' names."""
    return [(piece, font.getname()[0]) for piece, font in layout(text, 16, limit)]


def test_latin_greek_cyrillic():
    assert [piece for piece, _ in texts("Trouser")] == ["Trouser"]
    for text in ("café", "ελληνικά", "Привет, мир", "naïve – “quoted”"):
        assert texts(text) == [(text, "DejaVu Sans")]
        assert texts(unicodedata.normalize("NFD", text)) == [(text, "DejaVu Sans")]


def test_characters_that_no_font_has_are_shown_by_their_codes():
    assert [piece for piece, _ in texts("猫 cat")] == ["\\u732b cat"]
    assert [piece for piece, _ in texts("🐈 \ud800\x1b")] == ["\\U0001f408 \\ud800\\x1b"]


def test_fonts_of_the_system(tmp_path):
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    write_font(tmp_path / "Squares-Bold.otf", "猫犬")
    write_font(tmp_path / "Squares.ttf", "猫犬")
    assert texts("猫犬") == [("猫犬", "Squares")]
    assert layout("猫", 16, 1000)[0][1].path.endswith("Squares.ttf")
    assert texts("猫\u200d\ufe0f") == [("猫\u200d\ufe0f", "Squares")]  # joiners are no glyphs
    pieces = texts("猫 cat é 🐈")
    assert [piece for piece, _ in pieces] == ["猫", " cat ", "é", " \\U0001f408"]
    assert [name for _, name in pieces[::2]] == ["Squares", "DejaVu Sans"]
    image = np.asarray(grid(np.zeros((1, 28, 28, 1), np.uint8), columns=1, row_labels=["猫 cat"]))
    right = image.shape[1] - 86 - GAP
    assert (image[:, :right] == INK).any() and (image[:, 0] != INK).all()


def test_texts_are_on_one_line():
    assert [piece for piece, _ in texts(" two\nlines\u2028three ")] == ["two lines three"]
    assert texts("") == texts("\n")


@pytest.mark.parametrize("text", ["a very long caption " * 9, "очень длинная подпись " * 9, "猫" * 90, "x" * 5000])
def test_long_texts_are_cut(text):
    pieces = layout(text, 16, 200)
    assert 150 < length(pieces) <= 200
    shown = "".join(piece for piece, _ in pieces)
    assert shown.endswith("...") and shown[:3] in (text[:3], "\\u7")
    assert not shown.endswith(" ...")
    assert "".join(piece for piece, _ in layout("short", 16, 200)) == "short"


def test_the_margin_of_a_grid_has_a_limit():
    for side, widest in ((28, 4 * 86), (64, 12 * 20), (128, 20 * 20), (512, 20 * 20)):
        images = np.zeros((2, side, side, 3), np.uint8)
        plain, labelled = grid(images, columns=1), grid(images, columns=1, row_labels=["word " * 99, "cat"])
        assert labelled.width - plain.width <= widest + 20, side
