"""Image grids, GIFs and the recipes inside PNGs, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.errors import InputError
from ldm_jax.sampling.image_grids import (
    FRAME_MS,
    GAP,
    INK,
    LAST_FRAME_MS,
    PAPER,
    comparison,
    enlargement,
    grid,
    read_recipe,
    sample_grid,
    save_denoising_gif,
    save_png,
)


def flat(values, side=28, channels=1):
    """One flat image for each grey value."""
    return np.tile(np.asarray(values, np.uint8)[:, None, None, None], (1, side, side, channels))


def centre(canvas, row, column, cell, margin=0):
    return canvas.getpixel((margin + GAP + column * (cell + GAP) + cell // 2, GAP + row * (cell + GAP) + cell // 2))


def test_enlargement_is_whole_and_leaves_large_images_alone():
    assert [enlargement(side) for side in (1, 28, 32, 64, 256)] == [84, 3, 3, 1, 1]


def test_grid_places_images_row_by_row_on_paper():
    image = grid(flat([10, 20, 30, 40, 50]), columns=3)
    assert image.size == (3 * 86 + 2, 2 * 86 + 2)
    assert [centre(image, i // 3, i % 3, 84) for i in range(5)] == [10, 20, 30, 40, 50]
    assert centre(image, 1, 2, 84) == PAPER  # the last row is short
    assert image.getpixel((0, 0)) == PAPER


def test_enlarged_pixels_are_clean_squares():
    image = np.array([[0, 255], [255, 0]], np.uint8).reshape(1, 2, 2, 1)
    pixels = np.asarray(grid(image, columns=1, scale=3))[GAP:-GAP, GAP:-GAP]
    np.testing.assert_array_equal(pixels, np.kron([[0, 1], [1, 0]], np.ones((3, 3))) * 255)


def test_colour_is_kept_and_oblong_images_fit():
    image = np.zeros((2, 10, 20, 3), np.uint8)
    image[..., 1] = 200
    image = grid(image, columns=2, scale=1)
    assert image.size == (2 * 22 + 2, 14)
    assert image.getpixel((GAP + 25, GAP + 5)) == (0, 200, 0)


def test_labels_are_written_before_their_rows():
    images = flat([0, 0, 0, 0])
    plain, labelled = grid(images, columns=2), grid(images, columns=2, row_labels=["Trouser", ""])
    margin = labelled.width - plain.width
    assert margin > 40
    rows = np.asarray(labelled)[:, :margin]
    upper, lower = rows[: labelled.height // 2], rows[labelled.height // 2 :]
    assert (upper == INK).any() and (lower == PAPER).all()
    with pytest.raises(InputError, match="has 2 rows, got 1"):
        grid(images, columns=2, row_labels=["one"])


def test_sample_grid_shows_a_row_of_each_class():
    labels = np.array([1, 0, 1, 0, 0, 1, -1])
    images = flat(labels * 100 + np.array([1, 2, 3, 4, 5, 6, 100]))
    image = sample_grid(images, labels, ["zero", "one"])
    margin = image.width - 3 * 86 - 2
    shown = [[centre(image, row, column, 84, margin) for column in range(3)] for row in range(2)]
    assert shown == [[2, 4, 5], [101, 103, 106]]
    assert sample_grid(images, labels).height == image.height  # numbers instead of names


def test_sample_grid_of_many_classes_and_of_none():
    labels = np.arange(40) // 2
    image = sample_grid(flat(labels), labels, side=3)
    margin = image.width - 2 * 86 - 2
    assert [centre(image, row, 0, 84, margin) for row in range(3)] == [0, 10, 19]
    for none in (None, np.full(40, -1)):
        assert sample_grid(flat(labels), none, side=3).size == (3 * 86 + 2, 3 * 86 + 2)
    assert sample_grid(flat([1, 2]), side=3).size == (2 * 86 + 2, 86 + 2)


def test_reconstructions_stand_below_their_originals():
    rows = {"original": flat([1, 2, 3, 4, 5]), "decoded": flat([11, 12, 13, 14, 15])}
    image = comparison(rows, columns=2)
    margin = image.width - 2 * 86 - 2
    shown = [[centre(image, row, column, 84, margin) for column in range(2)] for row in range(4)]
    assert shown == [[1, 2], [11, 12], [3, 4], [13, 14]]
    with pytest.raises(InputError, match="one shape"):
        comparison({"original": flat([1]), "decoded": flat([1, 2])})


def test_png_carries_its_recipe(tmp_path):
    path = tmp_path / "deep" / "samples.png"
    recipe = {"seed": 3, "sampler": "ddim", "class": "T-shirt/top – α"}
    save_png(grid(flat([1]), columns=1), path, recipe)
    assert read_recipe(path) == recipe
    assert [file.name for file in path.parent.iterdir()] == ["samples.png"]


def test_read_recipe_refuses_what_has_none(tmp_path):
    save_png(grid(flat([1]), columns=1), tmp_path / "bare.png")
    (tmp_path / "text.png").write_text("hello")
    Image.new("L", (2, 2)).save(tmp_path / "other.gif")
    for name, words in (
        ("bare.png", "no recipe"),
        ("other.gif", "no recipe"),
        ("text.png", "not an image file"),
        ("absent.png", "No such file"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            read_recipe(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_loops_and_holds_its_last_frame(tmp_path, channels):
    frames = np.stack([flat([value, value + 5, 0], channels=channels) for value in (0, 100, 200)])
    save_denoising_gif(frames, tmp_path / "denoising.gif")
    gif = Image.open(tmp_path / "denoising.gif")
    assert gif.n_frames == 3 and gif.info["loop"] == 0
    assert gif.size == (2 * 86 + 2, 2 * 86 + 2)
    durations, greys = [], []
    for i in range(3):
        gif.seek(i)
        durations.append(gif.info["duration"])
        greys.append(gif.convert("RGB").getpixel((40, 40))[0])
    assert durations == [FRAME_MS, FRAME_MS, LAST_FRAME_MS]
    np.testing.assert_allclose(greys, [0, 100, 200], atol=1)
    with pytest.raises(InputError, match=r"denoising\.gif needs frames"):
        save_denoising_gif(frames[0], tmp_path / "bad.gif")
