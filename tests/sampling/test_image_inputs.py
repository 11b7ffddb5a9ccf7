"""Pictures from pictures: the functions, and the command on a trained model."""

import jobs
import numpy as np
import pytest
from PIL import Image
from scipy.stats import kstest

from ldm_jax import command_line, sample
from ldm_jax.errors import InputError
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling import generate, image_inputs
from ldm_jax.sampling.image_grids import read_recipe, save_png
from ldm_jax.sampling.recipe import Recipe



def test_slerp_by_hand():
    a, b = np.array([2.0, 0.0], np.float32), np.array([0.0, 2.0], np.float32)
    way = image_inputs.slerp(a, b, np.array([0, 1 / 3, 0.5, 1]))
    np.testing.assert_allclose(way, [[2, 0], [3**0.5, 1], [2**0.5, 2**0.5], [0, 2]], atol=1e-6)
    np.testing.assert_allclose(image_inputs.slerp(a, a, np.array([0.3])), [a])
    np.testing.assert_allclose(image_inputs.slerp(a, -a, np.array([0.25])), [a / 2])


def test_slerp_keeps_noise_noise():
    a, b = np.random.default_rng(0).standard_normal((2, 40, 40)).astype(np.float32)
    assert kstest(image_inputs.slerp(a, b, np.array([0.5])).ravel(), "norm").pvalue > 0.01
    assert kstest(((a + b) / 2).ravel(), "norm").pvalue < 1e-6  # a straight line does not


def test_mask_of_latents_by_hand():
    mask = np.zeros((4, 6), bool)
    mask[3, 2] = True
    assert image_inputs.mask_of_latents(mask, 2)[..., 0].tolist() == [[False] * 3, [False, True, False]]
    np.testing.assert_array_equal(image_inputs.mask_of_latents(mask, 1)[..., 0], mask)


@pytest.mark.parametrize("where", ["left:2", "right:2", "up:2", "down:2"])
def test_outpainting_by_hand(where):
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    window, new = image_inputs.outpaint_window(image, where)
    assert new.sum() == 8
    drawn = np.where(new[None, ..., None], np.uint8(100), window[None])
    whole = image_inputs.outpainted(image, drawn, where)[0, ..., 0]
    grown = {"left": (0, 6, 2), "right": (0, 6, 0), "up": (2, 4, 0), "down": (0, 4, 0)}[where.split(":")[0]]
    top, width, left = grown
    assert whole.shape == (24 // width, width)
    np.testing.assert_array_equal(whole[top : top + 4, left : left + 4], image[..., 0])
    assert (whole == 100).sum() == 8
    beside = {"left": (slice(None), slice(2, 4)), "right": (slice(None), slice(2)),
              "up": (slice(2, 4), slice(None)), "down": (slice(2), slice(None))}[where.split(":")[0]]  # fmt: skip
    kept = {"left": image[:, :2], "right": image[:, 2:], "up": image[:2], "down": image[2:]}[where.split(":")[0]]
    np.testing.assert_array_equal(window[beside], kept)


@pytest.mark.parametrize("where, shape", [("left:5", (4, 11)), ("down:3", (7, 6))])
def test_a_side_of_a_wide_picture_is_outpainted(where, shape):
    image = np.arange(24, dtype=np.uint8).reshape(4, 6, 1)
    window, new = image_inputs.outpaint_window(image, where)
    assert window.shape == (4, 6, 1) and new.shape == (4, 6)
    assert image_inputs.outpainted(image, window[None], where).shape == (1, *shape, 1)
    with pytest.raises(InputError, match="1 to 3 pixels" if "down" in where else "1 to 5 pixels"):
        image_inputs.outpaint_window(image, where.replace("5", "6").replace("3", "4"))


@pytest.fixture
def files(tmp_path):
    """A picture of class 0, one of class 1, and a mask whose right half is white: 8x8."""
    ramp = np.tile(np.linspace(0, 200, 8).astype(np.uint8), (8, 1))
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    for name, picture in (("a", ramp), ("b", ramp.T), ("mask", mask)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def draw(trained_run, tmp_path):
    """Runs the command; returns its samples.npz."""

    def run(name, *flags):
        out = tmp_path / name
        assert (
            command_line.run(sample.main, ["sample", f"--model={trained_run}", f"--out={out}", "--num=8", *flags]) == 0
        )
        return jobs.samples(out)["images"]

    return run


def test_the_flags_are_in_the_recipe(draw, tmp_path):
    flags = ["--sampler=edm", "--churn=4", "--timesteps=19,15,9,5,0", "--guidance=8", "--guidance_rescale=0.7"]
    images = draw("out", *flags, "--negative_label=dark")
    assert images.shape == (8, 8, 8, 1)
    recipe = read_recipe(tmp_path / "out" / "samples.png")
    expected = {"sampler": "edm", "churn": 4, "spacing": [19, 15, 9, 5, 0], "steps": 5, "guidance": 8,
                "guidance_rescale": 0.7, "negative_label": 3}  # fmt: skip
    assert {name: recipe[name] for name in expected} == expected


@pytest.fixture
def decoded(files, trained_run):
    """What the autoencoder makes of a.png, [8, 8, 1]."""
    model = pipeline_load.load(trained_run)
    generator = generate.build_generator(model.config, 4, 4)
    params, original = replicate(model.params), np.asarray(Image.open(files / "a.png"))[None, ..., None]
    return generator.decode(params, generator.encode(params, original))[0].astype(float)


def test_a_little_strength_changes_little(draw, files, decoded):
    changes = [
        np.abs(draw(f"s{strength}", f"--init_image={files}/a.png", "--steps=20", f"--strength={strength}") - decoded)
        for strength in (0.05, 0.5, 1.0)
    ]
    small, middle, large = (change.mean() for change in changes)
    assert small < 4  # of 255
    assert small < middle < large


def test_what_the_mask_keeps_comes_back_to_the_bit(draw, files):
    original = np.asarray(Image.open(files / "a.png"))[..., None]
    for name, more in (("plain", []), ("resampled", ["--resample=3", "--resample_jump=2", "--sampler=ddpm"])):
        images = draw(name, f"--init_image={files}/a.png", f"--mask={files}/mask.png", *more)
        np.testing.assert_array_equal(images[:, :, :4], np.broadcast_to(original[:, :4], (8, 8, 4, 1)))
        assert (images[:, :, 4:] != original[:, 4:]).any()
        assert (images[0] != images[4]).any()  # the same class, another sample


def test_outpainting_leaves_the_picture_and_adds_to_it(draw, files):
    original = np.asarray(Image.open(files / "a.png"))[..., None]
    images = draw("outpainted", f"--init_image={files}/a.png", "--outpaint=left:3", "--sampler=ddpm", "--resample=2")
    assert images.shape == (8, 8, 11, 1)
    np.testing.assert_array_equal(images[:, :, 3:], np.broadcast_to(original, (8, 8, 8, 1)))
    assert (images[0, :, :3] != images[4, :, :3]).any()


def test_inversion_and_back_is_the_decoded_picture(draw, files, decoded):
    flags = [f"--init_image={files}/a.png", "--invert", "--sampler=ddim", "--steps=20", "--guidance=1", "--label=0"]
    images = draw("inverted", *flags)
    assert np.abs(images.astype(float) - decoded).mean() < 6  # of 255; the network has learned next to nothing
    np.testing.assert_array_equal(images[0], images[7])


def test_ways_between_seeds_and_pictures_end_where_they_should(draw, files):
    label = "--label=dark"
    way = draw("way", "--to_seed=7", label)
    np.testing.assert_array_equal(way[0], draw("from", "--seed=0", label)[0])
    np.testing.assert_array_equal(way[-1], draw("to", "--seed=7", label)[0])
    assert (way[3] != way[0]).any()
    between = draw("between", f"--init_image={files}/a.png", f"--to_image={files}/b.png", label)
    np.testing.assert_array_equal(between[0], draw("a", f"--init_image={files}/a.png", "--invert", label)[0])
    np.testing.assert_array_equal(between[-1], draw("b", f"--init_image={files}/b.png", "--invert", label)[0])


def test_a_recipe_makes_the_pictures_again(draw, files, trained_run, tmp_path):
    flags = [f"--init_image={files}/a.png", f"--mask={files}/mask.png", "--sampler=ddpm", "--steps=7", "--seed=3",
             "--resample=2", "--label=bright,dark", "--guidance=3", "--guidance_interval=0.1,0.9"]  # fmt: skip
    first = draw("first", *flags)
    recipe = tmp_path / "first" / "samples.png"
    command = ["sample", f"--model={trained_run}", f"--out={tmp_path / 'again'}", f"--from_recipe={recipe}"]
    assert command_line.run(sample.main, command) == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "again")["images"], first)
    assert read_recipe(tmp_path / "again" / "samples.png") == read_recipe(recipe)


def test_a_recipe_of_changed_inputs_is_refused(draw, files, trained_run, tmp_path, capsys):
    draw("first", f"--init_image={files}/a.png")
    (files / "b.png").replace(files / "a.png")
    recipe = tmp_path / "first" / "samples.png"
    command = ["sample", f"--model={trained_run}", f"--out={tmp_path / 'again'}", f"--from_recipe={recipe}"]
    assert command_line.run(sample.main, command) == 2
    assert "drawn from another" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--from_recipe=nowhere.png"], "nowhere.png: cannot be read as a picture: No such file"),
        (["--from_recipe=FILES/a.png"], "carries no recipe"),
        (["--from_recipe=FILES/a.png", "--steps=3"], "--from_recipe says it all; leave out --steps"),
        (["--from_recipe=FILES/other.png"], "was drawn by another model (0123) than --model"),
        (["--from_recipe=FILES/old.png"], "is of another version: it says nothing of num, labels"),
    ],
)
def test_a_recipe_is_refused(flags, expected, files, trained_run, tmp_path, capsys):
    drawn_by_another = dict.fromkeys(Recipe._fields, 0) | {"model": "0123"}
    for name, recipe in (("other", drawn_by_another), ("old", {"seed": 3})):
        save_png(Image.new("L", (8, 8)), files / f"{name}.png", recipe)
    flags = [flag.replace("FILES", str(files)) for flag in flags]
    assert command_line.run(sample.main, ["sample", f"--model={trained_run}", f"--out={tmp_path / 'out'}", *flags]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
