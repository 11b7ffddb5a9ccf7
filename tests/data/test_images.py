import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.images import decode, fit, fit_segments
from ldm_jax.errors import InputError


def encoded(image: Image.Image, format_: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_, **options)
    return buffer.getvalue()


def grey(rows) -> np.ndarray:
    return np.array(rows, np.uint8)


def test_what_fits_is_handed_on_untouched():
    x = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    assert fit(x, size=4, channels=3, crop="center") is x
    assert fit(x, size=None, channels=3, crop="none") is x
    assert fit(x[:, :3], size=None, channels=3, crop="center").shape == (4, 3, 3)


@pytest.mark.parametrize(
    "size, rows, columns", [((3, 6), (2, 5), (0, 6)), ((8, 2), (0, 8), (2, 4)), (6, (1, 7), (0, 6))]
)
def test_what_is_cropped_has_the_proportions_of_the_result(size, rows, columns):
    """Of 8x6 (height x width): the largest part in the middle; twice the size is of the same part."""
    x = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    part = x[slice(*rows), slice(*columns)]
    np.testing.assert_array_equal(fit(x, size=size, channels=3, crop="center"), part)
    np.testing.assert_array_equal(fit_segments(x[..., 0], size=size, crop="center"), part[..., :1])
    twice = tuple(2 * side for side in part.shape[:2])
    np.testing.assert_array_equal(fit_segments(x[..., 0], size=twice, crop="center")[::2, ::2], part[..., :1])
    assert fit(x, size=twice, channels=3, crop="none").shape == (*twice, 3)


def test_segments_are_cropped_like_their_picture_and_never_mixed():
    x = grey([[0, 0, 7, 7, 3, 3], [0, 0, 7, 7, 3, 3], [1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3, 3]])
    assert fit_segments(x, size=2, crop="none").shape == (2, 2, 1)
    assert fit_segments(x[..., None], size=None, crop="none")[..., 0].tolist() == x.tolist()
    assert fit_segments(Image.fromarray(x), size=4, crop="center")[..., 0].tolist() == x[:, 1:5].tolist()
    large = fit_segments(x, size=64, crop="center")
    assert set(np.unique(large)) == {0, 1, 2, 3, 7}


def test_of_a_palette_the_numbers_count_and_colour_is_no_map():
    image = Image.fromarray(grey([[0, 1], [2, 1]]))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert fit_segments(image, size=2, crop="center")[..., 0].tolist() == [[0, 1], [2, 1]]
    with pytest.raises(InputError, match="must be grey or have a palette, not RGB"):
        fit_segments(image.convert("RGB"), size=2, crop="center")


def test_grey_gets_a_channel_axis():
    x = grey([[1, 2], [3, 4]])
    np.testing.assert_array_equal(fit(x, size=2, channels=1, crop="center"), x[:, :, None])


def test_grey_to_colour_repeats_the_level():
    x = grey([[10, 20], [30, 40]])
    for image in (x, x[:, :, None], Image.fromarray(x)):
        colour = fit(image, size=2, channels=3, crop="center")
        np.testing.assert_array_equal(colour, np.repeat(x[:, :, None], 3, axis=2))


def test_colour_to_grey_is_luma():
    # 0.299 R + 0.587 G + 0.114 B: 76.2, 149.7, 29.1
    x = np.diag([255, 255, 255]).astype(np.uint8)[None]  # one red, one green, one blue pixel
    assert fit(x, size=None, channels=1, crop="none").ravel().tolist() == pytest.approx([76, 150, 29], abs=0.5)


def test_transparency_is_laid_on_white():
    x = np.array([[[100, 0, 0, 255], [100, 0, 0, 0], [100, 0, 0, 51]]], np.uint8)  # opaque, clear, a fifth opaque
    expected = [[[100, 0, 0], [255, 255, 255], [224, 204, 204]]]
    np.testing.assert_array_equal(fit(x, size=None, channels=3, crop="none"), expected)


def test_palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(
        fit(decode(encoded(image)), size=None, channels=3, crop="none"), [[[0, 0, 255], [255, 0, 0]]]
    )
    content = encoded(image, transparency=0)
    np.testing.assert_array_equal(
        fit(decode(content), size=None, channels=3, crop="none"), [[[255, 255, 255], [255, 0, 0]]]
    )


def test_16_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 257, 25700, 65535]], np.uint16)
    image = decode(encoded(Image.fromarray(levels)))
    np.testing.assert_array_equal(fit(image, size=None, channels=1, crop="none").ravel(), [0, 1, 100, 255])


def test_1_bit_pictures():
    image = decode(encoded(Image.fromarray(grey([[0, 255]])).convert("1")))
    np.testing.assert_array_equal(fit(image, size=None, channels=1, crop="none").ravel(), [0, 255])


def test_center_crop_takes_the_middle():
    x = grey([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])
    np.testing.assert_array_equal(fit(x, size=2, channels=1, crop="center")[:, :, 0], [[2, 3], [8, 9]])
    np.testing.assert_array_equal(fit(x.T, size=2, channels=1, crop="center")[:, :, 0], [[2, 8], [3, 9]])
    x = x[:, :5]  # cannot be in the middle: the smaller margin first, and no half pixels
    np.testing.assert_array_equal(fit(x, size=2, channels=1, crop="center")[:, :, 0], [[1, 2], [7, 8]])


def test_without_crop_the_whole_picture_is_squeezed():
    x = np.repeat(grey([[0, 200]]), 4, axis=1)  # four dark columns, four bright ones, one row
    out = fit(np.repeat(x, 2, axis=0), size=2, channels=1, crop="none")[:, :, 0]
    assert out[0, 0] < 40 and out[0, 1] > 160


def test_shrinking_is_antialiased_bicubic():
    # Halving spreads Keys' kernel (a = -1/2) over 4 pixels at distances .25 .25 .75 1.25 of the output's pitch (one
    # side is cut off by the edge): weights .8672 .8672 .2266 -.0703, sum 1.8906. 200 * (.2266 - .0703) / 1.8906 = 16.5.
    row = grey([[0, 0, 200, 200]])
    out = fit(np.repeat(row, 4, axis=0), size=2, channels=1, crop="center")[:, :, 0]
    np.testing.assert_array_equal(out, [[17, 183], [17, 183]])
    checkers = np.indices((32, 32)).sum(0) % 2 * 255  # a picture without antialiasing would stay black or white
    assert np.ptp(fit(checkers.astype(np.uint8), size=8, channels=1, crop="center")[1:-1, 1:-1]) <= 2


def test_enlarging_keeps_a_constant():
    out = fit(np.full((3, 5, 3), 77, np.uint8), size=9, channels=3, crop="center")
    assert out.shape == (9, 9, 3) and out.dtype == np.uint8 and (out == 77).all()


def test_exif_turns_upright():
    image = Image.fromarray(grey([[0, 50], [100, 150], [200, 250]]))  # 3 rows, 2 columns
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    out = fit(decode(encoded(image, exif=exif)), size=None, channels=1, crop="none")[:, :, 0]
    np.testing.assert_array_equal(out, [[200, 100, 0], [250, 150, 50]])


@pytest.mark.parametrize("format_", ["png", "jpeg", "webp", "gif", "bmp"])
def test_truncated_pictures_are_refused(format_):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    content = encoded(image, format_)
    assert decode(content).size == (40, 40)
    for damaged in (content[: len(content) // 2], content[:3], b"", b"<html></html>"):
        with pytest.raises(InputError, match=r"not an? (readable )?image") as error:
            decode(damaged)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("full", "kind"), [(4095, np.uint16), (255, np.uint16), (65535, np.int32), (4095, np.int32),
                                            (1, np.float32), (255, np.float32), (65535, np.float32)])  # fmt: skip
def test_grey_of_more_than_8_bits_is_scaled_by_the_least_full_scale(full, kind):
    ramp = (np.linspace(0, 1, 6)[None] * full).astype(kind)
    ramp[0, -1] = full
    content = encoded(Image.fromarray(ramp), "tiff")
    expected = np.round(ramp.astype(float) * 255 / full).ravel()
    found = fit(decode(content), size=None, channels=1, crop="none").ravel()
    np.testing.assert_array_equal(found, expected)
    assert found.max() == 255


@pytest.mark.parametrize("values", [[-1.0, 3.0], [0.0, 70_000.0], [np.nan, 1.0]])
def test_grey_outside_all_scales_is_refused(values):
    image = decode(encoded(Image.fromarray(np.array([values], np.float32)), "tiff"))
    with pytest.raises(InputError, match="they must be from 0 to 65535"):
        fit(image, size=None, channels=1, crop="none")


def png_16(values):
    """A PNG of 16-bit colours, uint16 [H, W, 3], which Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_12_bit_colours_in_16_bits_are_refused_not_black():
    ramp = np.linspace(0, 65535, 8).astype(np.uint16)[None, :, None].repeat(3, 2)
    np.testing.assert_array_equal(np.asarray(decode(png_16(ramp)))[0, :, 0], ramp[0, :, 0] >> 8)
    with pytest.raises(InputError, match="12-bit colours in a file of 16 bits"):
        decode(png_16(ramp >> 4))
