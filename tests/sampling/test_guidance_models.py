"""Pictures led by texts: by a CLIP's gradient, whatever the model knows, and from one prompt to another."""

import jax
import jobs
import numpy as np
import pytest

from ldm_jax import command_line, sample
from ldm_jax.diffusion.denoiser import from_network
from ldm_jax.diffusion.forward import NoiseLevel
from ldm_jax.diffusion.guidance import classifier_free, similarity_guided
from ldm_jax.models.pixels import to_pixels
from ldm_jax.pipeline import clip as pipeline_clip
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling import generate, guidance_models, tables
from ldm_jax.sampling.generate import request
from ldm_jax.sampling.image_grids import read_recipe



@pytest.fixture
def draw(tmp_path):
    """`draw(model, *flags)` -> the pictures, and the file with them."""

    def draw(model, *flags):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        command = ["sample", f"--model={model}", f"--out={out}", "--steps=3", "--batch_size=8", *flags]
        assert command_line.run(sample.main, command) == 0
        return jobs.samples(out)["images"], out / "samples.png"

    return draw


def likeness(run, images, prompt):
    """Cosines of pictures and a text."""
    found = pipeline_clip.load(run)
    return pipeline_clip.embed_images(found, images, 8) @ pipeline_clip.embed_texts(found, [prompt], 4)[0]


@pytest.mark.parametrize("prompt", ["dark", "bright"])
def test_a_clip_leads_a_model_of_classes_to_a_text(prompt, trained_run, text_run, draw):
    led = [
        draw(trained_run, f"--clip={text_run}", f"--prompt={prompt}", "--num=8", "--label=0", f"--clip_scale={scale}")[
            0
        ]
        for scale in (0, 1, 4)
    ]
    likenesses = [likeness(text_run, images, prompt).mean() for images in led]
    assert likenesses == sorted(likenesses) and likenesses[-1] > likenesses[0] + 0.01
    plain, _ = draw(trained_run, "--num=8", "--label=0")
    assert np.abs(plain.astype(int) - led[0]).max() <= 1  # another program, the same pictures


def test_each_picture_is_led_to_its_own_text(text_run, draw):
    """In a model of texts to that which it is told of; one alone is as among others."""
    flags = [f"--clip={text_run}", "--clip_scale=3"]
    both, path = draw(text_run, *flags, "--prompt=dark", "--prompt=bright", "--num=4")
    one, _ = draw(text_run, *flags, "--prompt=dark", "--num=3")
    np.testing.assert_array_equal(one[[0, 2]], both[[0, 2]])
    assert (one[1] != both[1]).any()
    again, _ = draw_again(text_run, path)
    np.testing.assert_array_equal(again, both)


def draw_again(model, path):
    out = path.parent / "again"
    assert command_line.run(sample.main, ["sample", f"--model={model}", f"--out={out}", f"--from_recipe={path}"]) == 0
    return jobs.samples(out)["images"], out


def test_what_a_generator_sees_of_a_picture(trained_run, text_run):
    """One call of its guided denoiser, put together by hand from the parts."""
    model, found = pipeline_load.load(trained_run), pipeline_clip.load(text_run)
    rng = np.random.default_rng(0)
    shaken = lambda tree: jax.tree.map(lambda p: p + rng.normal(0, 0.2, p.shape).astype(p.dtype), tree)  # noqa: E731
    params = model.params | {name: shaken(model.params[name]) for name in ("unet", "conditioner")}
    generator = generate.generator_of(model, 8, guidance_models.Guides(clip=found))
    assert_seen_as_by_hand(generator, model, params | {"clip": found.params}, found, rng)


def assert_seen_as_by_hand(generator, model, params, found, rng):
    from ldm_jax.models.first_stage import from_latents
    from ldm_jax.pipeline import from_config as pipeline_from_config

    sought = pipeline_clip.embed_texts(found, ["dark", "a horizontal picture"], 4)[np.arange(8) % 2]
    scales = np.float32([0, 1, 2, 3, 0, 1, 2, 3])
    z_T = rng.normal(size=(8, *pipeline_from_config.latent_shape(model.config))).astype(np.float32)
    table = tables.build_table(model.config, sampler="ddim", steps=1)
    wanted = request(8, [1], guidance=2.0, seed=0, z_T=z_T, sought=sought, clip_scale=scales)
    ((got, _),) = generator.latents(replicate(params), wanted, table)

    unet, first_stage = (
        pipeline_from_config.build_unet(model.config),
        pipeline_from_config.build_first_stage(model.config),
    )
    tau, null = pipeline_from_config.build_tau(model.config, 4)
    process, t = pipeline_from_config.build_process(model.config), int(table.t[0])
    denoise = classifier_free(
        from_network(
            lambda z, t, told: unet.apply({"params": params["unet"]}, z, t, **told),
            model.config.diffusion.prediction,
            process,
        ),
        tau(params["conditioner"], np.full(8, 1)),
        tau(params["conditioner"], np.full(1, null)),
        np.full(8, 2.0, np.float32),
    )

    def cosines(z0):
        x = first_stage.decode(params["autoencoder"], from_latents(z0, params["shift"], params["scale"]))
        image = found.clip.apply({"params": found.params}, x, method="embed_image")
        return np.exp(found.params["logit_scale"]) * (image * sought).sum(-1)

    level = NoiseLevel(t, process.alpha[t], process.sigma[t])
    by_hand = jax.jit(lambda z_T: similarity_guided(denoise, cosines, scales)(z_T, level))(z_T)
    np.testing.assert_allclose(got, by_hand, rtol=1e-3, atol=1e-3)
    assert np.abs(got - np.asarray(jax.jit(lambda z: denoise(z, level))(z_T)))[scales > 0].max() > 0.01


def test_pictures_of_another_size_are_seen_as_the_clip_sees_them(text_run):
    """An even picture is the same at any size."""
    found = pipeline_clip.load(text_run)
    texts = pipeline_clip.embed_texts(found, ["dark"], 4)
    small, large = (to_pixels(np.full((1, side, side, 1), 70, np.uint8)) for side in (8, 20))
    seen = guidance_models.make_similarity(found)
    np.testing.assert_allclose(seen(found.params, large, texts), seen(found.params, small, texts), rtol=1e-4)


def test_a_way_leads_from_one_prompt_to_another(text_run, draw):
    flags = ["--guidance=1e5", "--seed=3"]
    way, path = draw(text_run, *flags, "--prompt=dark", "--to_prompt=bright")
    ends = [draw(text_run, *flags, f"--prompt={prompt}")[0][0] for prompt in ("dark", "bright")]
    assert len(way) == 8 and (ends[0] != ends[1]).any()
    np.testing.assert_array_equal(way[0], ends[0])
    assert np.abs(way[-1].astype(int) - ends[1]).max() <= 1  # a + 1 (b - a)
    between = np.abs(way[3].astype(int) - ends[0]).max(), np.abs(way[3].astype(int) - ends[1]).max()
    assert min(between) > 1
    recipe = read_recipe(path)
    assert (recipe["prompts"], recipe["to_prompt"]) == (["dark"], "bright")
    np.testing.assert_array_equal(draw_again(text_run, path)[0], way)


REFUSED = {  # model, flags -> what the line must say
    "no text for a clip": ("classes", ["--clip=TEXTS"], "needs a text to guide towards"),
    "no clip for a scale": ("texts", ["--prompt=dark", "--clip_scale=2"], "--clip_scale needs --clip"),
    "a negative scale": ("texts", ["--prompt=dark", "--clip=TEXTS", "--clip_scale=-1"], "clip_scale"),
    "no such clip": ("texts", ["--prompt=dark", "--clip=nowhere"], "--clip: nowhere does not exist"),
    "a run without a clip": ("texts", ["--prompt=dark", "--clip=CLASSES"], "has no CLIP"),
    "a text for a model of classes": ("classes", ["--prompt=dark"], "is for models of texts, or with --clip"),
    "away from a text": ("classes", ["--clip=TEXTS", "--prompt=a", "--negative_prompt=b"], "--negative_prompt is for"),
    "from two prompts": ("texts", ["--prompt=dark", "--prompt=low", "--to_prompt=bright"], "there are 2"),
    "from no prompt": ("texts", ["--to_prompt=bright"], "--prompt is missing"),
    "a way without texts": ("classes", ["--clip=TEXTS", "--prompt=a", "--to_prompt=b"], "--to_prompt is for models"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_lead_is_refused(case, trained_run, text_run, tmp_path, capsys):
    which, given, said = REFUSED[case]
    runs = {"CLASSES": str(trained_run), "TEXTS": str(text_run)}
    given = [flag.replace("CLASSES", runs["CLASSES"]).replace("TEXTS", runs["TEXTS"]) for flag in given]
    command = ["sample", f"--model={runs[which.upper()]}", f"--out={tmp_path / 'out'}", *given]
    assert command_line.run(sample.main, command) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
