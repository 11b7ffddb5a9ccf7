"""Conditions as maps: what is known of a picture, the map made of it, and models of each kind from end to end."""

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn
from PIL import Image

from ldm_jax import command_line, evaluate, sample
from ldm_jax.data import from_config as data_from_config
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.models.concat_conditioning import (
    inpainting,
    low_resolution,
    make_map_condition,
    random_boxes,
    segments_map,
)
from ldm_jax.models.conditioning import ClassEmbedder
from ldm_jax.models.first_stage import make_first_stage
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.pipeline.trainable import labelled
from ldm_jax.runtime.files import read_json
from ldm_jax.sampling import concat_inputs
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.training.diffusion import make_diffusion_stage

IMAGES, _ = tiny.pictures(16)
KEYS = jax.random.split(jax.random.key(0), 16)
PIXELS = make_first_stage(None)
PLAIN = {"autoencoder": {}, "shift": jnp.zeros(1), "scale": jnp.ones(1)}


def test_low_resolution_by_hand():
    condition = low_resolution((4, 4, 1), channels=1, factor=2)
    flat = np.full((1, 8, 8, 1), 200, np.uint8)
    known = condition.know({"x": flat}, KEYS[:1])
    assert known["small"].shape == (1, 4, 4, 1)
    assert (known["small"] == 200).all()
    np.testing.assert_allclose(condition.to_map(PLAIN, known), 200 / 127.5 - 1, rtol=1e-6)  # of the latents' size
    larger = low_resolution((8, 8, 1), channels=1, factor=2)
    assert larger.to_map(PLAIN, known).shape == (1, 8, 8, 1)


def test_low_resolution_is_what_pillow_makes():
    known = low_resolution((4, 4, 1), channels=1, factor=2).know({"x": IMAGES}, KEYS)["small"]
    pillow = [Image.fromarray(x[..., 0]).resize((4, 4), Image.Resampling.BICUBIC) for x in IMAGES]
    assert np.abs(np.asarray(known[..., 0], int) - np.stack([np.asarray(x, int) for x in pillow])).max() <= 1


def test_an_inpainting_map_is_the_mask_and_what_it_leaves():
    halves = PIXELS._replace(encode=lambda params, x: x[:, ::2, ::2])
    condition = inpainting(halves, (4, 4, 1))
    mask = np.zeros((1, 8, 8, 1), np.uint8)
    mask[:, 4:, 2:] = 1
    known = {"x": IMAGES[:1], "mask": mask}
    frozen = PLAIN | {"shift": jnp.array([0.5]), "scale": jnp.array([2.0])}
    found = np.asarray(condition.to_map(frozen, known))[0]
    expected = np.where(mask[0, ::2, ::2, 0], 0, IMAGES[0, ::2, ::2, 0] / 127.5 - 1)
    np.testing.assert_array_equal(found[..., 0], mask[0, ::2, ::2, 0])
    np.testing.assert_allclose(found[..., 1], (expected - 0.5) * 2, atol=1e-6)
    assert condition.channels == 2


def test_an_inpainting_map_knows_nothing_of_what_is_hidden():
    condition = inpainting(PIXELS, (8, 8, 1))
    known = condition.know({"x": IMAGES}, KEYS)
    changed = known | {"x": np.where(known["mask"] == 1, 255 - IMAGES, IMAGES)}
    np.testing.assert_array_equal(condition.to_map(PLAIN, known), condition.to_map(PLAIN, changed))
    assert (np.asarray(changed["x"]) != IMAGES).any()


def test_random_boxes_hide_some_of_every_picture_and_differ():
    masks = np.asarray(jax.vmap(lambda key: random_boxes(key, (28, 28)))(jax.random.split(jax.random.key(1), 500)))
    share = masks.mean((1, 2, 3))
    assert masks.shape == (500, 28, 28, 1)
    assert 0.03 < share.min() < 0.2
    assert 0.6 < share.max() < 1
    assert len({mask.tobytes() for mask in masks}) > 490
    assert (masks.mean(0) > 0.02).all()  # also in the corners


def test_segments_are_shares_of_each_place():
    condition = segments_map((2, 2, 1), segments=3)
    segments = np.zeros((1, 4, 4, 1), np.uint8)
    segments[0, :2, :2] = 2
    segments[0, 2:, 2:] = [[[1], [1]], [[1], [1]]]
    found = np.asarray(condition.to_map(PLAIN, condition.know({"segments": segments}, KEYS[:1])))[0]
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    assert found.argmax(-1).tolist() == [[2, 0], [0, 1]]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="low_resolution, inpainting, segments, got 'depth'"):
        make_map_condition("depth", first_stage=PIXELS, latent_shape=(4, 4, 1), channels=1, factor=2, segments=2)


class Pointwise(nn.Module):
    """The smallest network that is a UNet to the stage: it compiles at once."""

    @nn.compact
    def __call__(self, z_t, t, context):
        return nn.Conv(1, (1, 1))(z_t)


def test_in_training_the_map_lies_beside_its_own_picture():
    """Also when that is mirrored: in pixel space, so that the latents are the picture."""
    condition = low_resolution((8, 8, 1), channels=1, factor=2)
    stage = make_diffusion_stage(
        network=labelled(Pointwise(), ClassEmbedder(4, 2), (8, 8, 2)),
        map_condition=condition,
        first_stage=PIXELS,
        latent_shape=(8, 8, 1),
        process=make_process("linear", 20),
        prediction="eps",
        weighting="uniform",
        snr_gamma=5.0,
        label_dropout=0.1,
        flip=True,
        optimizer=optax.sgd(0.1),
        ema_decay=0.9,
    )
    batch = {"x": IMAGES, "label": np.zeros(16, np.int32), "id": np.arange(16, dtype=np.int32), "step": np.int32(0)}
    seen = jax.jit(stage.trace)(stage.init(jax.random.key(0)), PLAIN, batch, np.uint32(0))
    pictures = np.asarray((seen["z0"] + 1) * 127.5).round().astype(np.uint8)
    beside = condition.to_map(PLAIN, condition.know({"x": pictures}, KEYS))
    np.testing.assert_allclose(seen["map"], beside, atol=1e-5)
    assert 2 < (pictures == IMAGES).all((1, 2, 3)).sum() < 14  # some as they were, some mirrored


# The first also through the end of a job, its scores; the second also through an autoencoder, and the command's scores.
KINDS = {
    "low_resolution": (
        "--config.concat.kind=low_resolution",
        "--config.concat.factor=2",
        "--config.autoencoder.kind=none",
        "--config.data.flip=True",
        "--config.sampling.progress_every=2",
    ),
    "inpainting": ("--config.concat.kind=inpainting", "--config.sampling.num=0"),
    "segments": (
        "--config.concat.kind=segments",
        "--config.concat.num_segments=3",
        "--config.data.segments_key=areas",
        "--config.autoencoder.kind=none",
        "--config.sampling.num=0",
    ),
}


@pytest.fixture(scope="module")
def run_of(tiny_data, trained_run, tmp_path_factory):
    """The run folder of a small job of a kind, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            few = (jobs.NO_ATTENTION, "--config.diffusion.steps=2", f"--config.autoencoder.checkpoint={trained_run}")
            assert jobs.train_here(tiny_data, made[kind], *few, *KINDS[kind]) == 0
        return made[kind]

    return make


def test_a_job_ends_with_restored_test_pictures(run_of):
    run = run_of("low_resolution")
    config = pipeline_load.load(run).config
    images, test_set = jobs.samples(run)["images"], data_from_config.load_split(config, "test")
    known = concat_inputs.from_split(config, test_set, len(images), config.seed)
    np.testing.assert_array_equal(known.originals, test_set[np.arange(8)]["x"])
    np.testing.assert_array_equal(jobs.samples(run)["labels"], test_set[np.arange(8)]["label"])
    recipe, cards = read_recipe(run / "samples.png"), read_json(run / "evaluation.json")
    assert (recipe["map"], recipe["map_split"]) == ("", "test")
    for group in ("restored", "baseline"):
        assert {"rFD-VGG16", "PSNR", "LPIPS-vgg16"} <= cards[group].keys()
        assert cards[group]["PSNR"]["n"] == 8
    assert cards["baseline"]["PSNR"]["value"] > 15  # bicubic enlargement of 4x4 pixels
    assert (run / "progress" / "diffusion_000002.png").exists()


@pytest.fixture
def draw(tmp_path):
    """Runs the command on a run folder; returns the images."""

    def run(model, name, *flags, status=0):
        command = ["sample", f"--model={model}", f"--out={tmp_path / name}", "--num=4", "--nosave_trajectory", *flags]
        assert command_line.run(sample.main, command) == status
        return jobs.samples(tmp_path / name)["images"] if status == 0 else None

    return run


def test_a_small_picture_from_a_file(draw, run_of, tmp_path):
    run = run_of("low_resolution")
    small = np.random.default_rng(0).integers(0, 255, (4, 4), np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    images = draw(run, "one", f"--map={tmp_path}/small.png")
    assert images.shape == (4, 8, 8, 1)
    other = draw(run, "other", f"--map={tmp_path}/small.png", "--seed=1")
    assert (images != other).any()
    recipe = tmp_path / "one" / "samples.png"
    command = ["sample", f"--model={run}", f"--out={tmp_path / 'again'}", f"--from_recipe={recipe}"]
    assert command_line.run(sample.main, [*command, "--nosave_trajectory"]) == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "again")["images"], images)


def test_a_model_that_inpaints_keeps_the_rest_to_the_bit(draw, run_of, tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    for name, picture in (("a", IMAGES[0, ..., 0]), ("mask", mask)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    files = [f"--init_image={tmp_path}/a.png", f"--mask={tmp_path}/mask.png"]
    for name, more in (("whole", []), ("a part of the way", ["--strength=0.5"])):
        images = draw(run_of("inpainting"), name, *files, *more)
        np.testing.assert_array_equal(images[:, :, :4], np.broadcast_to(IMAGES[0, :, :4], (4, 8, 4, 1)))
        assert (images[0] != images[1]).any()


def test_segments_from_a_file(draw, run_of, tmp_path):
    areas = Image.fromarray(tiny.areas(IMAGES[0])[..., 0])
    areas.putpalette([0, 0, 0, 90, 0, 0, 0, 200, 0])  # what the colours are does not matter
    areas.save(tmp_path / "areas.png")
    assert draw(run_of("segments"), "out", f"--map={tmp_path}/areas.png").shape == (4, 8, 8, 1)


REFUSED = {
    "a map for a model without": (None, ["--map=FILES/small.png"], "this one takes no map"),
    "a map for a model that inpaints": ("inpainting", ["--map=FILES/small.png"], "takes --init_image and --mask"),
    "a picture without a mask": ("inpainting", ["--init_image=FILES/small.png"], "needs --mask with this model"),
    "a picture without a map": ("low_resolution", ["--init_image=FILES/small.png"], "needs --map with this model"),
    "a map that is not there": ("low_resolution", ["--map=FILES/no.png"], "no.png: No such file"),
    "a map that is no picture": ("low_resolution", ["--map=FILES/text.png"], "text.png: not a picture"),
    "a class too many": ("segments", ["--map=FILES/small.png"], "has a pixel of class 200; the model knows 0 to 2"),
    "a class for test pictures": ("segments", ["--label=dark"], "--label=dark: without a picture of yours this model"),
    "segments in colour": ("segments", ["--map=FILES/colour.png"], "must be grey or have a palette, not RGB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sample_refuses(case, draw, run_of, trained_run, tmp_path, capsys):
    kind, flags, expected = REFUSED[case]
    Image.new("L", (8, 8), 200).save(tmp_path / "small.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    (tmp_path / "text.png").write_text("no picture")
    run = run_of(kind) if kind else trained_run
    capsys.readouterr()
    draw(run, "out", *(flag.replace("FILES", str(tmp_path)) for flag in flags), status=2)
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluate_scores_what_was_restored(run_of, tmp_path):
    """Hidden parts alone are drawn, other ones for another seed, and only then scored."""
    run, out = run_of("inpainting"), tmp_path / "out"
    assert command_line.run(evaluate.main, ["evaluate", f"--model={run}", f"--out={out}", "--num=6", "--seed=3"]) == 0
    cards, images, config = (
        read_json(out / "evaluation.json"),
        jobs.samples(out)["images"],
        pipeline_load.load(run).config,
    )
    test_set = data_from_config.load_split(config, "test")
    known, other = (concat_inputs.from_split(config, test_set, 6, seed) for seed in (3, 4))
    np.testing.assert_array_equal(concat_inputs.keep_known(known, images), images)
    assert (concat_inputs.keep_known(other, images) != images).any()
    assert cards["restored"]["PSNR"]["n"] == 6
    assert cards["restored"]["PSNR"]["value"] > 0


def test_the_nearest_known_pixel_fills():
    x = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    mask = np.zeros((1, 4, 4, 1), np.uint8)
    mask[0, 1:3, 3] = 1
    config = tiny.get_config().unlock()
    config.concat.kind = "inpainting"
    filled = concat_inputs.baseline(config, concat_inputs.Given({"x": x, "mask": mask}))[0, ..., 0]
    assert filled[1, 3] in (3, 6)
    assert filled[2, 3] in (10, 15)
    np.testing.assert_array_equal(np.delete(filled, 3, axis=1), np.delete(x[0, ..., 0], 3, axis=1))
    nothing = concat_inputs.baseline(config, concat_inputs.Given({"x": x, "mask": np.ones_like(mask)}))
    assert (nothing == concat_inputs.GREY).all()
