"""Samples that begin from images: the functions, and the command on a trained model."""

import jobs
import numpy as np
import pytest
from PIL import Image
from scipy.stats import kstest

from ldm_jax import command_line, sample
from ldm_jax.errors import InputError
from ldm_jax.pipeline.load import load
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling import image_inputs
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.sampling.sampler import make_sampler


def test_slerp_by_hand():
    a, b = np.array([2.0, 0.0], np.float32), np.array([0.0, 2.0], np.float32)
    path = image_inputs.slerp(a, b, np.array([0, 1 / 3, 0.5, 1]))
    np.testing.assert_allclose(path, [[2, 0], [3**0.5, 1], [2**0.5, 2**0.5], [0, 2]], atol=1e-6)
    np.testing.assert_allclose(image_inputs.slerp(a, a, np.array([0.3])), [a])
    np.testing.assert_allclose(image_inputs.slerp(a, -a, np.array([0.25])), [a / 2])


def test_slerp_keeps_noise_noise():
    a, b = np.random.default_rng(0).standard_normal((2, 40, 40)).astype(np.float32)
    assert kstest(image_inputs.slerp(a, b, np.array([0.5])).ravel(), "norm").pvalue > 0.01
    assert kstest(((a + b) / 2).ravel(), "norm").pvalue < 1e-6  # a straight line does not


def test_latent_mask_by_hand():
    mask = np.zeros((4, 6), bool)
    mask[3, 2] = True
    assert image_inputs.latent_mask(mask, 2)[..., 0].tolist() == [[False] * 3, [False, True, False]]
    np.testing.assert_array_equal(image_inputs.latent_mask(mask, 1)[..., 0], mask)


@pytest.mark.parametrize("where", ["left:2", "right:2", "up:2", "down:2"])
def test_outpainting_by_hand(where):
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    window, new = image_inputs.outpaint_window(image, where)
    assert new.sum() == 8
    samples = np.where(new[None, ..., None], np.uint8(100), window[None])
    whole = image_inputs.outpainted(image, samples, where)[0, ..., 0]
    grown = {"left": (0, 6, 2), "right": (0, 6, 0), "up": (2, 4, 0), "down": (0, 4, 0)}[where.split(":")[0]]
    top, width, left = grown
    assert whole.shape == (24 // width, width)
    np.testing.assert_array_equal(whole[top : top + 4, left : left + 4], image[..., 0])
    assert (whole == 100).sum() == 8
    edge = {"left": (slice(None), slice(2, 4)), "right": (slice(None), slice(2)),
              "up": (slice(2, 4), slice(None)), "down": (slice(2), slice(None))}[where.split(":")[0]]  # fmt: skip
    kept = {"left": image[:, :2], "right": image[:, 2:], "up": image[:2], "down": image[2:]}[where.split(":")[0]]
    np.testing.assert_array_equal(window[edge], kept)


@pytest.mark.parametrize("where, shape", [("left:5", (4, 11)), ("down:3", (7, 6))])
def test_a_side_of_a_wide_image_is_outpainted(where, shape):
    image = np.arange(24, dtype=np.uint8).reshape(4, 6, 1)
    window, new = image_inputs.outpaint_window(image, where)
    assert window.shape == (4, 6, 1) and new.shape == (4, 6)
    assert image_inputs.outpainted(image, window[None], where).shape == (1, *shape, 1)
    with pytest.raises(InputError, match="1 to 3 pixels" if "down" in where else "1 to 5 pixels"):
        image_inputs.outpaint_window(image, where.replace("5", "6").replace("3", "4"))


@pytest.fixture
def files(tmp_path):
    """An image of class 0, one of class 1, and a mask whose right half is white: 8x8."""
    ramp = np.tile(np.linspace(0, 200, 8).astype(np.uint8), (8, 1))
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    for name, picture in (("a", ramp), ("b", ramp.T), ("mask", mask)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def sampled(trained_run, tmp_path):
    """Runs the command; returns its samples.npz."""

    def run(name, *flags):
        out = tmp_path / name
        assert (
            command_line.run(sample.main, ["sample", f"--model={trained_run}", f"--out={out}", "--num=8", *flags]) == 0
        )
        return jobs.samples(out)["images"]

    return run


def test_the_flags_are_in_the_recipe(sampled, tmp_path):
    flags = ["--sampler=edm", "--churn=4", "--timesteps=19,15,9,5,0", "--guidance=8", "--guidance_rescale=0.7"]
    images = sampled("out", *flags, "--negative_label=dark")
    assert images.shape == (8, 8, 8, 1)
    recipe = read_recipe(tmp_path / "out" / "samples.png")
    solving, guidance = recipe["solving"], recipe["guidance"]
    assert (solving["sampler"], solving["churn"], solving["steps"]) == ("edm", 4, 5)
    assert solving["spacing"] == [19, 15, 9, 5, 0]
    assert (guidance["scale"], guidance["rescale"], guidance["negative_label"]) == (8, 0.7, 3)


@pytest.fixture
def decoded(files, trained_run):
    """The autoencoder's reconstruction of a.png, [8, 8, 1]."""
    model, params = load(trained_run)
    sampler, params = make_sampler(model, 8), replicate(params)
    original = np.asarray(Image.open(files / "a.png"))[None, ..., None]
    return sampler.decode(params, sampler.encode(params, original))[0].astype(float)


def test_a_little_strength_changes_little(sampled, files, decoded):
    changes = [
        np.abs(sampled(f"s{strength}", f"--init_image={files}/a.png", "--steps=20", f"--strength={strength}") - decoded)
        for strength in (0.05, 0.5, 1.0)
    ]
    small, middle, large = (change.mean() for change in changes)
    assert small < 4  # of 255
    assert small < middle < large


def test_inpainting_keeps_the_known_part_to_the_bit(sampled, files):
    original = np.asarray(Image.open(files / "a.png"))[..., None]
    for name, more in (("plain", []), ("resampled", ["--resample=3", "--resample_jump=2", "--sampler=ddpm"])):
        images = sampled(name, f"--init_image={files}/a.png", f"--mask={files}/mask.png", *more)
        np.testing.assert_array_equal(images[:, :, :4], np.broadcast_to(original[:, :4], (8, 8, 4, 1)))
        assert (images[:, :, 4:] != original[:, 4:]).any()
        assert (images[0] != images[4]).any()  # the same class, another sample


def test_outpainting_keeps_the_image_and_extends_it(sampled, files):
    original = np.asarray(Image.open(files / "a.png"))[..., None]
    images = sampled("outpainted", f"--init_image={files}/a.png", "--outpaint=left:3", "--sampler=ddpm", "--resample=2")
    assert images.shape == (8, 8, 11, 1)
    np.testing.assert_array_equal(images[:, :, 3:], np.broadcast_to(original, (8, 8, 8, 1)))
    assert (images[0, :, :3] != images[4, :, :3]).any()


def test_ddim_inversion_and_sampling_is_the_reconstruction(sampled, files, decoded):
    flags = [f"--init_image={files}/a.png", "--invert", "--sampler=ddim", "--steps=20", "--guidance=1", "--label=0"]
    images = sampled("inverted", *flags)
    assert np.abs(images.astype(float) - decoded).mean() < 6  # of 255; the network has learned next to nothing
    np.testing.assert_array_equal(images[0], images[7])


@pytest.mark.slow
def test_interpolations_of_seeds_and_images_end_where_they_should(sampled, files):
    label = "--label=dark"
    path = sampled("path", "--to_seed=7", label)
    np.testing.assert_array_equal(path[0], sampled("from", "--seed=0", label)[0])
    np.testing.assert_array_equal(path[-1], sampled("to", "--seed=7", label)[0])
    assert (path[3] != path[0]).any()
    between = sampled("between", f"--init_image={files}/a.png", f"--to_image={files}/b.png", label)
    np.testing.assert_array_equal(between[0], sampled("a", f"--init_image={files}/a.png", "--invert", label)[0])
    np.testing.assert_array_equal(between[-1], sampled("b", f"--init_image={files}/b.png", "--invert", label)[0])


def half_white(mode):
    """A mask whose upper half is white and whose lower half is transparent black, in a mode with transparency."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 255
    la = Image.merge("LA", (Image.fromarray(alpha), Image.fromarray(alpha)))
    if mode == "P":
        image = Image.fromarray(alpha // 255)
        image.putpalette([0, 0, 0, 255, 255, 255])
        return image, {"transparency": 0}
    if mode == "hidden white":  # the colour below the transparent part
        return Image.merge("LA", (Image.new("L", (8, 8), 255), Image.fromarray(alpha))), {}
    if mode in ("L", "I;16"):
        image = Image.fromarray(alpha if mode == "L" else alpha.astype(np.uint16) * 257)
        return image, {"transparency": 0}
    return la.convert(mode), {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "I;16", "hidden white"])
def test_what_a_mask_has_transparent_is_kept(mode, files):
    image, options = half_white(mode)
    image.save(files / "layer.png", **options)
    mask = image_inputs.read_mask(files / "layer.png", files / "a.png", size=(8, 8), crop="center")
    np.testing.assert_array_equal(mask, np.repeat([[True], [False]], 4, axis=0).repeat(8, axis=1))


def test_the_image_with_a_part_erased_is_a_mask(files):
    """As other programs take it: that part is sampled."""
    image = Image.open(files / "a.png").convert("RGBA")
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[:, 5:] = 0
    image.putalpha(Image.fromarray(alpha))
    image.save(files / "erased.png")
    mask = image_inputs.read_mask(files / "erased.png", files / "a.png", size=(8, 8), crop="center")
    np.testing.assert_array_equal(mask, alpha == 0)


def test_masks_of_16_bits(files):
    half = np.zeros((8, 8), np.uint16)
    half[:4] = 65535
    Image.fromarray(half).save(files / "deep.png")
    mask = image_inputs.read_mask(files / "deep.png", files / "a.png", size=(8, 8), crop="center")
    np.testing.assert_array_equal(mask, half > 0)


@pytest.mark.parametrize(
    "flag", ["--init_image", "--to_image", "--mask", "--concat_image", "--concat_image of segments"]
)
def test_errors_of_an_image_name_its_flag(flag, files):
    """Also those after decoding: grey values beyond the scales, a segmentation map in colour."""
    Image.fromarray(np.full((8, 8), -3.0, np.float32)).save(files / "float.tif")
    Image.new("RGB", (8, 8)).save(files / "colour.png")
    fit = {"size": (8, 8), "crop": "center"}
    with pytest.raises(InputError) as error:
        if flag == "--mask":
            image_inputs.read_mask(files / "float.tif", files / "a.png", **fit)
        elif flag == "--concat_image of segments":
            image_inputs.read_segments(files / "colour.png", flag.split()[0], **fit)
        else:
            image_inputs.read_image(files / "float.tif", flag, channels=1, **fit)
    name = "colour.png" if "segments" in flag else "float.tif"
    assert str(error.value).startswith(f"{flag.split()[0]}={files / name}: ")


DAMAGED = {"nothing": b"", "a zip file": b"PK\x03\x04garbage", "a header": b"\x93NUMPY\x01\x00v\x00garbage"}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_latents_are_refused(case, tmp_path):
    (tmp_path / "z.npy").write_bytes(DAMAGED[case])
    with pytest.raises(InputError, match=r"^--init_latents=.*z\.npy cannot be read as \.npy: "):
        image_inputs.read_latents(tmp_path / "z.npy", (1, 4, 4, 2))


@pytest.mark.parametrize(
    ("image", "model", "multiple", "expected"),
    [
        ((512, 512), (512, 512), 8, (512, 512)),
        ((1024, 1024), (512, 512), 8, (512, 512)),  # of the model's proportions
        ((513, 512), (512, 512), 8, (512, 512)),
        ((683, 1024), (512, 512), 8, (680, 1024)),  # as diffusers does
        ((384, 512), (512, 512), 8, (384, 512)),
        ((3000, 4000), (512, 512), 8, (440, 592)),  # as many pixels as the model's
        ((40, 60), (512, 512), 8, (416, 624)),
        ((800, 1200), (28, 28), 4, (24, 36)),
        ((2, 3000), (28, 28), 4, (4, 1084)),
    ],
)
def test_the_size_of_samples_that_start_from_an_image(image, model, multiple, expected):
    assert image_inputs.size_like(image, model, multiple) == expected


def test_an_image_of_another_proportion_keeps_it(sampled, files, tmp_path, capsys):
    wide = np.tile(np.linspace(0, 250, 13).astype(np.uint8), (9, 1))
    Image.fromarray(wide).save(files / "wide.png")
    assert sampled("wide", f"--init_image={files}/wide.png").shape == (8, 8, 12, 1)
    assert "--init_image is 13x9: the samples are 12x8; --width and --height choose another" in capsys.readouterr().out
    assert read_recipe(tmp_path / "wide" / "samples.png")["size"] == [8, 12]
    assert sampled("square", f"--init_image={files}/wide.png", "--height=8", "--width=8").shape == (8, 8, 8, 1)


@pytest.mark.parametrize(("image", "size", "expected"), [
    ((20, 40), (16, 16), (20, 20)),
    ((40, 20), (16, 16), (20, 20)),
    ((100, 50), (64, 64), (50, 50)),
    ((50, 100), (32, 64), None),
    ((101, 203), (96, 200), None),  # rounded
    ((30, 30), (32, 16), (30, 15)),
])  # fmt: skip
def test_the_part_of_an_image_that_is_used(image, size, expected):
    assert image_inputs.cropped_size(image, size) == expected


@pytest.mark.slow
def test_an_image_of_other_proportions_than_the_samples_is_said(sampled, files, capsys):
    Image.new("L", (16, 8), 99).save(files / "wide.png")
    flags = [f"--init_image={files}/a.png", f"--to_image={files}/wide.png", "--label=dark"]
    sampled("cropped", *flags)
    line = "note: --to_image is 16x8: only its central 8x8 is used, as --init_image and the samples are 8x8\n"
    assert line in capsys.readouterr().err
    sampled("whole", f"--init_image={files}/a.png", f"--to_image={files}/b.png", "--label=dark")
    assert "central" not in capsys.readouterr().err
