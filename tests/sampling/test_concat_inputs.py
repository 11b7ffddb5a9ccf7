"""Models with concat conditioning from end to end: jobs, the images that they are given, and their scores."""

import jobs
import numpy as np
import pytest
import random_runs
import tiny
from PIL import Image

from ldm_jax import command_line, evaluate, sample
from ldm_jax.data.from_config import load_split
from ldm_jax.pipeline.load import load
from ldm_jax.runtime.files import read_json
from ldm_jax.sampling import concat_inputs
from ldm_jax.sampling.concat_inputs import ConcatImages
from ldm_jax.sampling.image_grids import read_recipe

IMAGES, _ = tiny.pictures(16)

# The first also through the end of a job, its scores; the second also through an autoencoder, and the command's scores.
KINDS = {
    "low_resolution": (
        "--config.concat.type=low_resolution",
        "--config.concat.factor=2",
        "--config.autoencoder.type=none",
        "--config.data.flip=True",
        "--config.sampling.progress_every=2",
    ),
    "inpainting": ("--config.concat.type=inpainting", "--config.sampling.num=0"),
    "segments": (
        "--config.concat.type=segments",
        "--config.concat.num_segments=3",
        "--config.data.segments_key=areas",
        "--config.autoencoder.type=none",
        "--config.sampling.num=0",
    ),
}


@pytest.fixture(scope="module")
def run_of(tiny_data, trained_run, tmp_path_factory):
    """run_of(type): the run folder of a small job, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            few = (jobs.NO_ATTENTION, "--config.diffusion.steps=2", f"--config.autoencoder.checkpoint={trained_run}")
            assert jobs.train_here(tiny_data, made[kind], *few, *KINDS[kind]) == 0
        return made[kind]

    return make


@pytest.fixture(scope="module")
def model_of(tiny_data, tmp_path_factory):
    """model_of(type): the run folder of such a model at random, made once."""
    made = {}
    small = {"unet.block_out_channels": (8,), "unet.attention": (False,), "data.dir": str(tiny_data)}
    of_type = {
        "low_resolution": {"concat.factor": 2, "autoencoder.type": "none"},
        "inpainting": {"autoencoder.mid_block_attention": False},
        "segments": {"concat.num_segments": 3, "data.segments_key": "areas", "autoencoder.type": "none"},
    }

    def make(name):
        if name not in made:
            changes = small | of_type[name] | {"concat.type": name}
            made[name] = random_runs.random_run(tmp_path_factory.mktemp(name) / "run", changes)
        return made[name]

    return make


@pytest.mark.slow
def test_a_job_ends_with_restored_test_images(run_of):
    run = run_of("low_resolution")
    model, _ = load(run)
    images, test_set = jobs.samples(run)["images"], load_split(model.origin.config, "test")
    degraded = concat_inputs.from_split(model, test_set, len(images), 0, 8)
    np.testing.assert_array_equal(degraded.originals, test_set[np.arange(8)]["x"])
    np.testing.assert_array_equal(jobs.samples(run)["labels"], test_set[np.arange(8)]["label"])
    recipe, cards = read_recipe(run / "samples.png"), read_json(run / "evaluation.json")
    assert recipe["concat"] == {"image": None, "split": "test", "noise_level": None}
    for group in ("restored", "baseline"):
        assert {"rFD-VGG16", "PSNR", "LPIPS-vgg16"} <= cards[group].keys()
        assert cards[group]["PSNR"]["n"] == 8
    assert cards["baseline"]["PSNR"]["value"] > 15  # bicubic enlargement of 4x4 pixels
    assert (run / "progress" / "diffusion_000002.png").exists()


@pytest.fixture
def sampled(tmp_path):
    """Runs the command on a run folder; returns the images."""

    def run(model, name, *flags, status=0):
        command = ["sample", f"--model={model}", f"--out={tmp_path / name}", "--num=4", "--nosave_trajectory", *flags]
        assert command_line.run(sample.main, command) == status
        return jobs.samples(tmp_path / name)["images"] if status == 0 else None

    return run


def test_a_low_resolution_image_from_a_file(sampled, model_of, tmp_path):
    run = model_of("low_resolution")
    small = np.random.default_rng(0).integers(0, 255, (4, 4), np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    images = sampled(run, "one", f"--concat_image={tmp_path}/small.png")
    assert images.shape == (4, 8, 8, 1)
    other = sampled(run, "other", f"--concat_image={tmp_path}/small.png", "--seed=1")
    assert (images != other).any()
    recipe = tmp_path / "one" / "samples.png"
    command = ["sample", f"--model={run}", f"--out={tmp_path / 'again'}", f"--from_recipe={recipe}"]
    assert command_line.run(sample.main, [*command, "--nosave_trajectory"]) == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "again")["images"], images)


def test_inpainting_keeps_the_known_part_to_the_bit(sampled, model_of, tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    for name, picture in (("a", IMAGES[0, ..., 0]), ("mask", mask)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    files = [f"--init_image={tmp_path}/a.png", f"--mask={tmp_path}/mask.png"]
    for name, more in (("whole", []), ("from a noised image", ["--strength=0.5"])):
        images = sampled(model_of("inpainting"), name, *files, *more)
        np.testing.assert_array_equal(images[:, :, :4], np.broadcast_to(IMAGES[0, :, :4], (4, 8, 4, 1)))
        assert (images[0] != images[1]).any()


def test_a_segmentation_map_from_a_file(sampled, model_of, tmp_path):
    areas = Image.fromarray(tiny.areas(IMAGES[0])[..., 0])
    areas.putpalette([0, 0, 0, 90, 0, 0, 0, 200, 0])  # what the colours are does not matter
    areas.save(tmp_path / "areas.png")
    assert sampled(model_of("segments"), "out", f"--concat_image={tmp_path}/areas.png").shape == (4, 8, 8, 1)


REFUSED = {
    "--concat_image for a model without": (None, ["--concat_image=FILES/small.png"], "this model takes neither"),
    "--concat_image for inpainting": ("inpainting", ["--concat_image=FILES/small.png"], "takes --init_image"),
    "an image without a mask": ("inpainting", ["--init_image=FILES/small.png"], "needs --mask with this model"),
    "an image without a map": ("low_resolution", ["--init_image=FILES/small.png"], "needs --concat_image"),
    "no such file": ("low_resolution", ["--concat_image=FILES/no.png"], "no.png: No such file"),
    "no image": ("low_resolution", ["--concat_image=FILES/text.png"], "text.png: not an image"),
    "a class too many": ("segments", ["--concat_image=FILES/small.png"], "has class 200; the model has 0 to 2"),
    "a class for test images": ("segments", ["--label=dark"], "--label=dark: without an image this model"),
    "a size for test images": ("low_resolution", ["--height=16"], "at their own size; add --concat_image"),
    "a size that does not divide": ("low_resolution", ["--concat_image=FILES/small.png", "--width=9"], "multiple of 2"),
    "segments in colour": ("segments", ["--concat_image=FILES/colour.png"], "must be grey or have a palette, not RGB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sample_refuses(case, sampled, model_of, trained_run, tmp_path, capsys):
    kind, flags, expected = REFUSED[case]
    Image.new("L", (8, 8), 200).save(tmp_path / "small.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    (tmp_path / "text.png").write_text("no picture")
    run = model_of(kind) if kind else trained_run
    capsys.readouterr()
    sampled(run, "out", *(flag.replace("FILES", str(tmp_path)) for flag in flags), status=2)
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_low_resolution_image_is_enlarged_to_any_size(sampled, model_of, tmp_path):
    Image.new("L", (6, 4), 90).save(tmp_path / "small.png")
    flags = [f"--concat_image={tmp_path}/small.png", "--height=12", "--width=20"]
    assert sampled(model_of("low_resolution"), "wide", *flags).shape == (4, 12, 20, 1)


@pytest.mark.slow
def test_evaluate_scores_restored_images(run_of, tmp_path):
    """Of masks that depend on the seed, the masked part alone is sampled, and then scored."""
    run, out = run_of("inpainting"), tmp_path / "out"
    assert command_line.run(evaluate.main, ["evaluate", f"--model={run}", f"--out={out}", "--num=6", "--seed=3"]) == 0
    cards, images, (model, _) = read_json(out / "evaluation.json"), jobs.samples(out)["images"], load(run)
    test_set = load_split(model.origin.config, "test")
    degraded, other = (concat_inputs.from_split(model, test_set, 6, seed, 8) for seed in (3, 4))
    np.testing.assert_array_equal(concat_inputs.paste_known(degraded, images), images)
    assert (concat_inputs.paste_known(other, images) != images).any()
    assert cards["restored"]["PSNR"]["n"] == 6
    assert cards["restored"]["PSNR"]["value"] > 0


def test_the_baseline_of_inpainting_is_the_nearest_known_pixel():
    x = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    mask = np.zeros((1, 8, 8, 1), np.uint8)
    mask[0, 1:3, 7] = 1
    model, _ = random_runs.random_model((("concat.type", "inpainting"),))
    filled = concat_inputs.baseline(model, ConcatImages({"x": x, "mask": mask}))[0, ..., 0]
    assert filled[1, 7] in (7, 14)
    assert filled[2, 7] in (22, 31)
    np.testing.assert_array_equal(np.delete(filled, 7, axis=1), np.delete(x[0, ..., 0], 7, axis=1))
    nothing = concat_inputs.baseline(model, ConcatImages({"x": x, "mask": np.ones_like(mask)}))
    assert (nothing == concat_inputs.GREY).all()
