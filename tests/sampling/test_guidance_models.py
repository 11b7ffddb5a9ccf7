"""Guidance by a CLIP's gradient, of models of any conditioning; and interpolation from one prompt to another."""

import json
import re

import diffusers_folder
import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest
import random_runs
import tiny

from ldm_jax import command_line, convert, sample
from ldm_jax.config import io as config_io
from ldm_jax.diffusion.denoiser import from_network
from ldm_jax.diffusion.forward import NoiseLevel
from ldm_jax.diffusion.guidance import classifier_free, similarity_guided
from ldm_jax.errors import InputError
from ldm_jax.models.pixels import to_pixels
from ldm_jax.pipeline.clip import embed_images, embed_texts, load_clip
from ldm_jax.pipeline.from_config import build_classifier
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import decode_latents
from ldm_jax.run_folder.checkpoint import Checkpoints, identity
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling.guidance_models import GuidanceModels, classifier_for
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.sampling.recipe import solving_defaults
from ldm_jax.sampling.sampler import PerSample, SampleInputs, Shared, clip_logits
from ldm_jax.sampling.tables import make_table


@pytest.fixture
def sampled(tmp_path):
    """`sampled(model, *flags)` -> the images, and the file with them."""

    def run(model, *flags):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        command = ["sample", f"--model={model}", f"--out={out}", "--steps=3", "--batch_size=8", *flags]
        assert command_line.run(sample.main, command) == 0
        return jobs.samples(out)["images"], out / "samples.png"

    return run


def sampled_again(model, path):
    out = path.parent / "again"
    assert command_line.run(sample.main, ["sample", f"--model={model}", f"--out={out}", f"--from_recipe={path}"]) == 0
    return jobs.samples(out)["images"]


def similarity(run, images, prompt):
    """Cosines of images and a text."""
    trained = load_clip(run)
    return embed_images(trained, images, 8) @ embed_texts(trained, [prompt], 4)[0]


@pytest.mark.parametrize("prompt", ["dark", "bright"])
def test_clip_guides_a_class_conditional_model_to_a_text(prompt, trained_run, text_run, sampled):
    flags = [f"--clip={text_run}", f"--prompt={prompt}", "--num=8", "--label=0"]
    guided = [sampled(trained_run, *flags, f"--clip_guidance_scale={scale}")[0] for scale in (0, 1, 4)]
    similarities = [similarity(text_run, images, prompt).mean() for images in guided]
    assert similarities == sorted(similarities) and similarities[-1] > similarities[0] + 0.01
    plain, _ = sampled(trained_run, "--num=8", "--label=0")
    assert np.abs(plain.astype(int) - guided[0]).max() <= 1  # another program, the same images


def test_each_image_is_guided_to_its_own_text(text_run, sampled):
    """In a text-to-image model to that which it is conditioned on; one alone as among others."""
    flags = [f"--clip={text_run}", "--clip_guidance_scale=3"]
    both, path = sampled(text_run, *flags, "--prompt=dark", "--prompt=bright", "--num=4")
    one, _ = sampled(text_run, *flags, "--prompt=dark", "--num=3")
    np.testing.assert_array_equal(one[[0, 2]], both[[0, 2]])
    assert (one[1] != both[1]).any()
    np.testing.assert_array_equal(sampled_again(text_run, path), both)


def test_the_guided_denoiser_is_that_of_its_parts(text_run):
    """One call of it, put together by hand."""
    (model, params), trained = random_runs.random_model(), load_clip(text_run)
    rng = np.random.default_rng(0)
    text_embeds = embed_texts(trained, ["dark", "a horizontal picture"], 4)[np.arange(8) % 2]
    scales, labels = np.float32([0, 1, 2, 3, 0, 1, 2, 3]), np.full(8, 1, np.int32)
    z_T = rng.normal(size=(8, *model.latent_shape)).astype(np.float32)
    samples = PerSample(
        np.arange(8, dtype=np.int32), labels, np.full(8, 2.0, np.float32), z_T,
        text_embeds=text_embeds, clip_guidance_scale=scales,
    )  # fmt: skip
    z0, mask = np.zeros(model.latent_shape, np.float32), np.ones((*model.latent_shape[:2], 1), bool)
    no_clip = np.float32(np.inf)
    shared = Shared(np.int32([4]), np.float32([0, 1]), np.float32(0), np.float32(0), no_clip, z0, mask)
    table = make_table(model, solving_defaults(model, "ddim", 1))
    guides = GuidanceModels(clip=trained)
    sampler = guides.sampler(model, 8)
    ((output, _),) = sampler.latents(replicate(params | guides.params), SampleInputs(samples, shared, 0), table)

    def network(z, t, cond):
        return model.denoiser.apply({"params": params["denoiser"]}, z, t, **cond)

    def cosines(z0):
        image = trained.clip.apply({"params": trained.params}, decode_latents(model, params, z0), method="embed_image")
        return np.exp(trained.params["logit_scale"]) * (image * text_embeds).sum(-1)

    cond, null = (model.conditioning.encode(params["conditioning"], rows) for rows in (labels, np.int32([4])))
    t = int(table.t[0])
    level = NoiseLevel(t, model.process.alpha[t], model.process.sigma[t])
    denoise = classifier_free(from_network(network, model.prediction, model.process), cond, null, samples.guidance)
    by_hand = jax.jit(lambda z_T: similarity_guided(denoise, cosines, scales)(z_T, level))(z_T)
    np.testing.assert_allclose(output, by_hand, rtol=1e-3, atol=1e-3)
    plain = np.asarray(jax.jit(lambda z: denoise(z, level))(z_T))
    assert np.abs(output - plain)[scales > 0].max() > 0.01


def test_images_of_another_size_are_resized_for_clip(text_run):
    """A uniform image is the same at any size."""
    trained = load_clip(text_run)
    texts = jnp.asarray(embed_texts(trained, ["dark"], 4))
    small, large = (to_pixels(np.full((1, side, side, 1), 70, np.uint8)) for side in (8, 20))
    logits = [clip_logits(trained.clip, trained.params, x, texts) for x in (small, large)]
    np.testing.assert_allclose(*logits, rtol=1e-4)


def test_interpolation_leads_from_one_prompt_to_another(text_run, sampled):
    flags = ["--guidance=1e5", "--seed=3"]
    path, file = sampled(text_run, *flags, "--prompt=dark", "--to_prompt=bright")
    # As many images as the path has: in a batch of another size the sums are in another order.
    ends = [sampled(text_run, *flags, f"--prompt={prompt}", "--num=8")[0][0] for prompt in ("dark", "bright")]
    assert len(path) == 8 and (ends[0] != ends[1]).any()
    np.testing.assert_array_equal(path[0], ends[0])
    assert np.abs(path[-1].astype(int) - ends[1]).max() <= 1  # a + 1 (b - a)
    assert min(np.abs(path[3].astype(int) - end).max() for end in ends) > 1
    recipe = read_recipe(file)
    assert (recipe["prompts"], recipe["edit"]["to_prompt"]) == (["dark"], "bright")
    np.testing.assert_array_equal(sampled_again(text_run, file), path)


@pytest.mark.slow
def test_a_classifier_guides_a_diffusers_folder_of_the_same_latents(trained_run, classifier_run, sampled, tmp_path):
    """Of the classes, latents and noise schedule that it was trained on, and of no others."""
    folder, guided = tmp_path / "folder", [f"--classifier={classifier_run}", "--classifier_scale=5", "--num=4"]
    assert command_line.run(convert.main, ["convert", f"--model={trained_run}", f"--to={folder}"]) == 0
    (folder / "recipe.json").unlink()
    plain, _ = sampled(folder, "--num=4", "--sampler=ddim")
    images, path = sampled(folder, *guided, "--sampler=ddim")
    assert (images != plain).any()
    of_run, _ = sampled(trained_run, *guided, "--sampler=ddim")
    assert np.abs(images.astype(int) - of_run).max() <= 1
    np.testing.assert_array_equal(sampled_again(folder, path), images)
    for name, changes, expected in (
        ("scheduler/scheduler_config.json", {"beta_end": 0.01}, "other noise schedules: T 20 with sigma"),
        ("model_index.json", {"latents_scale": [1.0, 1.0]}, "was trained on other latents than those of --model"),
        ("model_index.json", {"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}}, "has 4 classes (horizontal, "),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(json.dumps(json.loads(before) | changes))
        (model, params) = load(folder)
        with pytest.raises(InputError, match=re.escape(expected)):
            classifier_for(classifier_run, model, params)
        (folder / name).write_text(before)


@pytest.fixture(scope="module")
def with_classifier(tmp_path_factory):
    """A run folder with random parameters, of a classifier too."""
    run = random_runs.random_run(tmp_path_factory.mktemp("run") / "run", STAGES)
    config = config_io.from_json(run / "config.json")
    classifier = build_classifier(config, len(tiny.CLASS_NAMES))
    z_t, one = np.zeros((1, 4, 4, 2)), np.ones(1)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), z_t, one, one)["params"]
    params = {"classifier": diffusers_folder.random_params(shapes, 0)}
    with Checkpoints(run / "classifier", keep=1, identity=identity(config, "classifier")) as checkpoints:
        checkpoints.save({"step": np.int32(8), "ema_params": params})
    return run


STAGES = {"stages": ("autoencoder", "diffusion", "classifier")}


@pytest.mark.parametrize("size", [(), ("--height=12",), ("--height=6", "--width=12")])
def test_a_classifier_guides_samples_of_any_size(size, with_classifier, sampled):
    """As all networks are convolutional."""
    guided, path = sampled(with_classifier, "--num=4", *size, f"--classifier={with_classifier}", "--classifier_scale=9")
    plain, _ = sampled(with_classifier, "--num=4", *size)
    assert guided.shape == plain.shape and (guided != plain).any()
    np.testing.assert_array_equal(sampled_again(with_classifier, path), guided)


REFUSED = {  # model, flags -> what the line must say
    "no text for a clip": ("classes", ["--clip=TEXTS"], "needs a text to guide to"),
    "no clip for a scale": ("texts", ["--prompt=a", "--clip_guidance_scale=2"], "--clip_guidance_scale needs --clip"),
    "a negative scale": ("texts", ["--prompt=dark", "--clip=TEXTS", "--clip_guidance_scale=-1"], "clip_guidance"),
    "no such clip": ("texts", ["--prompt=dark", "--clip=nowhere"], "--clip: nowhere does not exist"),
    "a run without a clip": ("texts", ["--prompt=dark", "--clip=CLASSES"], "has no CLIP"),
    "a text for classes": ("classes", ["--prompt=dark"], "--prompt is for text-to-image models, or with --clip"),
    "a negative text": ("classes", ["--clip=TEXTS", "--prompt=a", "--negative_prompt=b"], "--negative_prompt is for"),
    "from two prompts": ("texts", ["--prompt=dark", "--prompt=low", "--to_prompt=bright"], "there are 2"),
    "from no prompt": ("texts", ["--to_prompt=bright"], "--prompt is missing"),
    "no texts to interpolate": ("classes", ["--clip=TEXTS", "--prompt=a", "--to_prompt=b"], "--to_prompt is for text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_guidance_is_refused(case, trained_run, text_run, tmp_path, capsys):
    which, flags, expected = REFUSED[case]
    runs = {"CLASSES": str(trained_run), "TEXTS": str(text_run)}
    flags = [flag.replace("CLASSES", runs["CLASSES"]).replace("TEXTS", runs["TEXTS"]) for flag in flags]
    command = ["sample", f"--model={runs[which.upper()]}", f"--out={tmp_path / 'out'}", *flags]
    assert command_line.run(sample.main, command) == 2
    error = capsys.readouterr().err
    assert expected in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
