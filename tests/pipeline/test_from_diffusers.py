"""Diffusers folders sampled by the command: what images depend on, and what is refused."""

import itertools
import json
import shutil
from dataclasses import replace

import diffusers_folder
import jobs
import numpy as np
import pytest
from PIL import Image

from ldm_jax import command_line, evaluate, sample
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.evaluation import scoring
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import SamplingDefaults
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.sampling.inputs import sample_inputs
from ldm_jax.sampling.recipe import default_recipe
from ldm_jax.sampling.sampler import make_sampler
from ldm_jax.sampling.tables import make_table

FOLDERS = {
    "plain": diffusers_folder.write_stable_diffusion,
    "xl": lambda folder: diffusers_folder.write_stable_diffusion(folder, xl=True),
    "inpainting": lambda folder: diffusers_folder.write_stable_diffusion(folder, inpainting=True),
    "upscaling": lambda folder: diffusers_folder.write_stable_diffusion(folder, upscaling=True),
    "unconditional": diffusers_folder.write_unconditional,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(name): made once; to be read or copied."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = FOLDERS[name](tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return make


@pytest.fixture
def sampled(tmp_path):
    """sampled(model, name, *flags) -> samples.npz, of four steps."""

    def run(model, name, *flags):
        command = ["sample", f"--model={model}", f"--out={tmp_path / name}", "--steps=4", *flags]
        assert command_line.run(sample.main, command) == 0
        return jobs.samples(tmp_path / name)

    return run


def test_prompts_and_negative_prompts_matter(folder_of, sampled, tmp_path):
    model = folder_of("plain")
    samples = sampled(model, "two", "--prompt=low", "--prompt=lower")
    assert samples["images"].shape == (2, 16, 16, 3)
    assert samples["labels"].tolist() == [0, 1]
    recipe = read_recipe(tmp_path / "two" / "samples.png")
    assert (recipe["prompts"], recipe["guidance"]["scale"]) == (["low", "lower"], 7.5)
    assert recipe["solving"]["sampler"] == "ddim"

    def changes(name, *flags):
        images = sampled(model, name, *flags)["images"].astype(int)
        return np.abs(images - samples["images"]).max((1, 2, 3)).tolist()

    same, other = changes("prompt", "--prompt=low", "--prompt=wool")
    assert same <= 1 and other > 2  # whatever else is sampled
    assert min(changes("negative", "--prompt=low", "--prompt=lower", "--negative_prompt=wool")) > 2


def test_more_images_than_prompts(folder_of, sampled):
    samples = sampled(folder_of("plain"), "out", "--prompt=low", "--prompt=lower", "--num=5")
    assert samples["labels"].tolist() == [0, 1, 0, 1, 0]
    assert len(samples["images"]) == 5


@pytest.mark.slow
def test_a_large_model_has_no_trajectory_unless_it_is_asked_for(folder_of, sampled, tmp_path):
    """Each frame is decoded."""
    for name, flags, written in (("plain", [], False), ("trajectory", ["--save_trajectory"], True)):
        sampled(folder_of("plain"), name, "--prompt=low", "--width=68", *flags)
        assert (tmp_path / name / "denoising.gif").exists() == written


@pytest.mark.slow
def test_a_recipe_makes_the_samples_again(folder_of, sampled, tmp_path):
    flags = ["--prompt=low", "--negative_prompt=lower", "--num=4", "--sampler=euler", "--dtype=bfloat16"]
    first = sampled(folder_of("plain"), "first", *flags)
    command = ["sample", f"--model={folder_of('plain')}", f"--from_recipe={tmp_path / 'first' / 'samples.png'}"]
    assert command_line.run(sample.main, [*command, f"--out={tmp_path / 'again'}", "--dtype=bfloat16"]) == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "again")["images"], first["images"])
    assert command_line.run(sample.main, [*command, f"--out={tmp_path / 'no'}"]) == 2  # of float32


@pytest.mark.slow
def test_bfloat16_is_near_float32(folder_of, sampled):
    exact, half = (sampled(folder_of("plain"), t, "--prompt=low", f"--dtype={t}") for t in ("float32", "bfloat16"))
    difference = np.abs(exact["images"].astype(int) - half["images"])
    assert 0 < difference.mean() < 10


@pytest.mark.slow
def test_the_null_condition_of_xl_is_not_the_empty_text(folder_of, sampled):
    """No negative prompt is zeros, an empty one is not."""
    nothing, empty = (sampled(folder_of("xl"), name, "--prompt=low", *flags)["images"]
                      for name, flags in (("nothing", []), ("empty", ["--negative_prompt="])))  # fmt: skip
    assert (nothing != empty).any()


@pytest.mark.slow
def test_force_zeros_for_empty_prompt_of_a_folder(folder_of, sampled, tmp_path):
    other = shutil.copytree(folder_of("xl"), tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    nothing, empty = (sampled(other, name, "--prompt=low", *flags)["images"]
                      for name, flags in (("nothing", []), ("empty", ["--negative_prompt="])))  # fmt: skip
    np.testing.assert_array_equal(nothing, empty)


def test_an_unconditional_model(folder_of, sampled):
    assert sampled(folder_of("unconditional"), "out", "--num=3", "--batch_size=4")["images"].shape == (3, 16, 16, 3)


@pytest.fixture
def files(tmp_path):
    """An image and a mask of its right half."""
    rng = np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


@pytest.fixture
def small_tiles(folder_of, tmp_path):
    """A model whose autoencoder was trained on images of 8 pixels."""
    folder = shutil.copytree(folder_of("plain"), tmp_path / "tiles")
    edit("vae/config.json", sample_size=8)(folder)
    return folder


@pytest.mark.slow
def test_a_model_of_wide_images_and_a_recipe_of_another_size(small_tiles, sampled, tmp_path):
    wide = shutil.copytree(small_tiles, tmp_path / "wide")
    edit("unet/config.json", sample_size=[6, 10])(wide)
    images = sampled(wide, "own", "--prompt=low", "--vae_tiling")["images"]
    assert images.shape == (1, 12, 20, 3)
    recipe = tmp_path / "own" / "samples.png"
    assert (read_recipe(recipe)["size"], read_recipe(recipe)["vae_tiling"]) == ([12, 20], True)
    command = ["sample", f"--model={small_tiles}", f"--from_recipe={recipe}", f"--out={tmp_path / 'again'}"]
    assert command_line.run(sample.main, command) == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "again")["images"], images)


@pytest.mark.slow
def test_large_images_in_tiles(small_tiles):
    """Nearly the same images, and exactly those where they are no larger than a tile."""
    model, params = load(small_tiles)
    params, z = replicate(params), np.random.default_rng(0).standard_normal((4, 4, 10, 4)).astype(np.float32)
    for width, off in ((8, (0, 0)), (20, (0.1, 30))):
        wide = model.at_size((8, width))
        tiled = replace(wide, first_stage=replace(wide.first_stage, tiled=True))
        whole, tiles = (
            make_sampler(some, 4).decode(params, z[:, :, : width // 2]).astype(int) for some in (wide, tiled)
        )
        assert whole.shape == (4, 8, width, 3)
        assert off[0] <= np.abs(tiles - whole).mean() <= off[1]


@pytest.mark.slow
def test_images_are_cropped_to_another_size(folder_of, sampled, files):
    edits = [f"--init_image={files}/image.png", f"--mask={files}/mask.png", "--prompt=low", "--height=8"]
    images = sampled(folder_of("inpainting"), "inpainting", *edits)["images"]
    assert images.shape == (1, 8, 16, 3)  # the width is the model's own
    np.testing.assert_array_equal(images[0, :, :8], np.asarray(Image.open(files / "image.png"))[4:12, :8])


def test_inpainting_keeps_the_known_part_to_the_bit(folder_of, sampled, files):
    original = np.asarray(Image.open(files / "image.png"))
    edit = [f"--init_image={files}/image.png", f"--mask={files}/mask.png", "--prompt=low", "--num=2"]
    for name in ("inpainting", "plain"):  # a model for it; and any model, by blending
        images = sampled(folder_of(name), name, *edit)["images"]
        np.testing.assert_array_equal(images[:, :, :8], np.broadcast_to(original[:, :8], (2, 16, 8, 3)))
        assert (images[0, :, 8:] != images[1, :, 8:]).any()


@pytest.mark.slow
def test_an_image_four_times_as_large(folder_of, sampled, tmp_path):
    """Of any size; the noise level matters."""
    small = np.random.default_rng(0).integers(0, 255, (6, 10, 3), np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    flags = [f"--concat_image={tmp_path}/small.png", "--prompt=low"]
    images = sampled(folder_of("upscaling"), "out", *flags, "--num=2")["images"].astype(int)
    assert images.shape == (2, 24, 40, 3)
    recipe = read_recipe(tmp_path / "out" / "samples.png")
    assert (recipe["concat"]["noise_level"], recipe["guidance"]["scale"], recipe["size"]) == (20, 9.0, [24, 40])
    other = sampled(folder_of("upscaling"), "more noise", *flags, "--num=2", "--noise_level=350")["images"]
    assert np.abs(other - images).max((1, 2, 3)).min() > 1


def test_an_upscalers_latents_have_the_scale_of_the_pipeline(folder_of):
    assert "0.18215" in (folder_of("upscaling") / "vae" / "config.json").read_text()
    _, params = load(folder_of("upscaling"))
    np.testing.assert_array_equal(params["scale"], np.full(4, 0.08333, np.float32))


def test_an_image_is_noised_by_the_initial_latents(folder_of, sampled, files):
    image = [f"--init_image={files}/image.png", "--strength=0.75", "--prompt=low"]
    z_T = np.random.default_rng(0).standard_normal((2, 1, 8, 8, 4)).astype(np.float32)
    for name, noise in zip("ab", z_T):
        np.save(files / f"{name}.npy", noise)
    a, b = (sampled(folder_of("plain"), name, *image, f"--init_latents={files}/{name}.npy")["images"] for name in "ab")
    assert (a != b).any()
    alone = sampled(folder_of("plain"), "no image", "--prompt=low", f"--init_latents={files}/a.npy")["images"]
    assert (a != alone).any()


@pytest.mark.slow
def test_initial_noise_that_is_scaled_is_noise_alone(folder_of, sampled, files, monkeypatch):
    """diffusers' init_noise_sigma: not of what an image is noised by, nor of the noise that it was inverted to."""

    def images(name):
        image = f"--init_image={files}/image.png"
        cases = {"plain": [], "noised": [image, "--strength=0.5"], "inverted": [image, "--invert", "--guidance=1"]}
        return {k: sampled(folder_of("plain"), f"{name} {k}", "--prompt=low", *v)["images"] for k, v in cases.items()}

    def scaled(defaults, sampler):
        return defaults.solvers[sampler]._replace(scaled_initial_noise=True)

    before = images("before")
    monkeypatch.setattr(SamplingDefaults, "solver", scaled)
    after = images("after")
    assert (before["plain"] != after["plain"]).any()
    for case in ("noised", "inverted"):
        np.testing.assert_array_equal(before[case], after[case])


LINSPACE = {"spacing": "linspace", "between": "linspace", "steps_offset": 1, "set_alpha_to_one": True}
LEADING = {"spacing": "leading", "between": "leading", "steps_offset": 1, "set_alpha_to_one": False}
ON_SIGMA = ("euler", "euler_a", "heun", "lms", "kdpm2", "kdpm2_a", "edm")  # begin with noise times init_noise_sigma
OPTIONS = {  # of each sampler: what `from_config` of its class in diffusers makes of diffusers_folder.SCHEDULER
    **dict.fromkeys((*ON_SIGMA, "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unipc"), LINSPACE),
    "ddim": LEADING | {"eta": 0.0},  # the model's own
    "ddpm": LEADING | {"set_alpha_to_one": True, "variance": "fixed_small"},
    "dpmpp_2s": LINSPACE | {"steps_offset": 0},  # a class without the field
    "deis": LINSPACE | {"set_alpha_to_one": False},  # these three whatever the file says
    "lcm": LEADING | {"set_alpha_to_one": True},
    "tcd": LEADING,
}


def test_every_sampler_has_the_options_that_diffusers_makes_of_the_scheduler(folder_of):
    """Or says why it cannot."""
    solvers = load(folder_of("plain"))[0].defaults.solvers
    assert solvers.keys() == set(SOLVERS) and "skip_prk_steps" in solvers["plms"]
    available = {name: solver for name, solver in solvers.items() if not isinstance(solver, str)}
    assert {name: solver.options for name, solver in available.items()} == OPTIONS
    assert {name for name, solver in available.items() if solver.scaled_initial_noise} == set(ON_SIGMA)
    assert {solver.clip_sample_range for solver in available.values()} == {np.inf}


def test_every_sampler_runs_and_differs_from_the_others(folder_of):
    """But for edm without churn, which is heun."""
    model, params = load(folder_of("plain"))
    params, sampler, latents = replicate(params), make_sampler(model, 1), {}
    for name in OPTIONS:
        recipe = default_recipe(model, 1, 0, [0], ["low"], name)
        recipe = recipe._replace(solving=recipe.solving._replace(steps=5))
        inputs = sample_inputs(model, params, recipe, sampler)[1]
        ((latents[name], _),) = sampler.latents(params, inputs, make_table(model, recipe.solving))
    assert np.isfinite(list(latents.values())).all()
    np.testing.assert_array_equal(latents.pop("edm"), latents["heun"])
    for one, other in itertools.combinations(latents, 2):
        assert np.abs(latents[one] - latents[other]).max() > 1e-2, (one, other)


def test_models_are_equal_by_value(folder_of):
    """So that the same model, loaded twice, shares what is compiled."""
    (one, _), (same, _), (half, _) = (load(folder_of("xl"), dtype) for dtype in (None, None, "bfloat16"))
    assert one == same and hash(one) == hash(same) and make_sampler(one, 4) is make_sampler(same, 4)
    assert one != half and one != load(folder_of("plain"))[0] and one != one.at_size((8, 8))


def test_a_long_prompt_is_truncated_with_a_warning(folder_of, sampled, capsys):
    truncated = sampled(folder_of("plain"), "truncated", "--prompt=" + "low " * 3000)["images"]
    assert "warning: 1 of the prompts are longer than the text encoder's context" in capsys.readouterr().err
    shorter = sampled(folder_of("plain"), "shorter", "--prompt=" + "low " * 6)["images"]
    np.testing.assert_array_equal(truncated, shorter)
    assert "warning" not in capsys.readouterr().err


def edit(name, **changes):
    """A damage: fields of a JSON file changed, None for removed."""

    def damage(folder):
        fields = json.loads((folder / name).read_text()) | changes
        removed = {field for field, value in changes.items() if value is None}
        (folder / name).write_text(json.dumps({k: v for k, v in fields.items() if k not in removed}))

    return damage


def cut_short(name):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def remove(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


MAP = "--concat_image=FOLDER/map.png"
WEIGHTS = "diffusion_pytorch_model.safetensors"
REFUSED = {  # folder, what is done to the folder, flags -> what the line must say
    "no index": ("plain", remove("model_index.json"), [], "is no run folder"),
    "a damaged index": ("plain", cut_short("model_index.json"), [], "model_index.json is damaged"),
    "an index of nothing": ("plain", lambda f: (f / "model_index.json").write_text("{}"), [], "names no component"),
    "another pipeline": ("plain", edit("model_index.json", _class_name="FluxPipeline"), [], "is a FluxPipeline"),
    "no pipeline": ("plain", edit("model_index.json", _class_name=None), [], "supported are StableDiffusionPipeline"),
    "an index without a unet": ("plain", edit("model_index.json", unet=None), [], "names no unet"),
    "an index without an encoder": ("plain", edit("model_index.json", text_encoder=None), [], "text_encoder"),
    "no unet": ("plain", remove("unet"), [], "there is no folder"),
    "no unet config": ("plain", remove("unet/config.json"), [], "unet/config.json"),
    "a damaged unet config": ("plain", cut_short("unet/config.json"), [], "unet/config.json"),
    "unknown blocks": ("plain", edit("unet/config.json", down_block_types=["A"]), [], "down_block_types"),
    "an unknown activation": ("plain", edit("unet/config.json", act_fn="mish"), [], "act_fn"),
    "another width": ("plain", edit("unet/config.json", block_out_channels=[24]), [], "size mismatch"),
    "no size": ("plain", edit("unet/config.json", sample_size=None), [], "sample_size is None; it must be"),
    "a size in words": ("plain", edit("unet/config.json", sample_size="large"), [], "sample_size is large; it must be"),
    "a size of three": ("plain", edit("unet/config.json", sample_size=[8, 8, 8]), [], "sample_size is [8, 8, 8]"),
    "a height that does not halve": ("plain", None, ["--height=17"], "--height=17 must be a multiple of 2"),
    "no height": ("plain", None, ["--height=0"], "--height"),
    "a width in words": ("plain", None, ["--width=wide"], "--width"),
    "tiles of a codebook": (
        "unconditional", edit("vqvae/config.json", sample_size=12), ["--vae_tiling"], "a tile of 12 pixels must be"),
    "tiles of no whole latents": (
        "plain", edit("vae/config.json", sample_size=12), ["--vae_tiling"], "a tile of 12 pixels must be a multiple"),
    "tiles of no size": ("plain", edit("vae/config.json", sample_size="all"), [], "sample_size is all; it must be"),
    "another class": ("plain", edit("unet/config.json", _class_name="FluxTransformer"), [], "FluxTransformer"),
    "no weights": ("plain", remove(f"unet/{WEIGHTS}"), [], "unet"),
    "half the weights": ("plain", cut_short(f"unet/{WEIGHTS}"), [], WEIGHTS),
    "half the autoencoder": ("plain", cut_short(f"vae/{WEIGHTS}"), [], WEIGHTS),
    "half the text encoder": ("plain", cut_short("text_encoder/model.safetensors"), [], "model.safetensors"),
    "texts of another width": (
        "plain", lambda f: diffusers_folder.write_text_encoder(f / "text_encoder", projection=None)
        or edit("unet/config.json", cross_attention_dim=8)(f), [], "size mismatch"),
    "no vocabulary": ("plain", remove("tokenizer/vocab.json"), [], "vocabulary is missing"),
    "a damaged vocabulary": ("plain", cut_short("tokenizer/vocab.json"), [], "damaged"),
    "a text encoder of another type": (
        "plain", edit("text_encoder/config.json", architectures=["T5EncoderModel"]), [], "architectures"),
    "no scheduler": ("plain", remove("scheduler"), [], "scheduler"),
    "an unknown scheduler": (
        "plain", edit("scheduler/scheduler_config.json", _class_name="Fancy"), [], "class 'Fancy' is not supported"),
    "an unknown schedule": (
        "plain", edit("scheduler/scheduler_config.json", beta_schedule="sigmoid"), [], "beta_schedule"),
    "no prompt": ("plain", None, [], "--prompt is missing"),
    "a class": ("plain", None, ["--label=3"], "the model has no classes"),
    "a prompt for none": ("unconditional", None, ["--prompt=low"], "--prompt is for text-to-image models"),
    "a negative prompt for none": ("unconditional", None, ["--negative_prompt=low"], "is conditioned on nothing"),
    "nothing to inpaint": ("inpainting", None, [], "inpaints; it needs an image and a mask of what to sample"),
    "nothing to enlarge": ("upscaling", None, [], "upscales; it needs a low-resolution --concat_image"),
    "no image to enlarge": ("upscaling", None, ["--concat_image=FOLDER/vae/config.json"], "config.json: not an image"),
    "a size beside the map's": ("upscaling", None, [MAP, "--height=64"], "are 4 times as large as --concat_image"),
    "more noise than there is": ("upscaling", None, [MAP, "--noise_level=351"], "must be from 0 to 350 for this model"),
    "less than no noise": ("upscaling", None, [MAP, "--noise_level=-1"], "--noise_level"),
    "noise for no upscaler": ("plain", None, ["--noise_level=20"], "is for upscalers of Stable Diffusion"),
    "a map for no upscaler": ("plain", None, [MAP], "this model takes neither"),
    "an upscaler of more levels": (
        "upscaling", edit("model_index.json", max_noise_level=400), [MAP], "max_noise_level is 400"),
    "an upscaler without levels": (
        "upscaling", edit("unet/config.json", num_class_embeds=300), [MAP], "size mismatch"),
    "an upscaler without its image": (
        "upscaling", edit("model_index.json", _class_name="StableDiffusionPipeline"), [], "UNet of 7 to 4"),
    "no upscaler at all": (
        "plain", edit("model_index.json", _class_name="StableDiffusionUpscalePipeline"), [], "no low_res_scheduler"),
    "an unconditional network": (
        "unconditional", edit("model_index.json", _class_name="StableDiffusionPipeline", vae=["a", "b"],
                              text_encoder=["a", "b"]), [], "the class of its UNet"),
    "an image that is none": ("plain", None, ["--init_image=FOLDER/unet/config.json"], "not an image"),
    "an unknown type": ("plain", None, ["--dtype=float8"], "--dtype"),
    "more steps than there are": ("plain", None, ["--steps=5000"], "steps"),
    "a sampler without what it needs": ("plain", None, ["--sampler=plms"], "skip_prk_steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_sample_refuses(case, folder_of, tmp_path, capsys):
    name, damage, flags, expected = REFUSED[case]
    folder = shutil.copytree(folder_of(name), tmp_path / "model")
    if damage:
        damage(folder)
    Image.new("RGB", (4, 4)).save(folder / "map.png")
    flags = [flag.replace("FOLDER", str(folder)) for flag in flags]
    if name != "unconditional" and case != "no prompt":
        flags += ["--prompt=low"]
    command = ["sample", f"--model={folder}", f"--out={tmp_path / 'out'}", "--steps=4", *flags]
    assert command_line.run(sample.main, command) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert expected in line
    assert not (tmp_path / "out").exists()


@pytest.fixture
def evaluated(tmp_path, tiny_data):
    """evaluated(model, *flags) -> the exit status of the command that scores it on the tiny data set."""
    data = ["--config=tests/tiny.py", f"--config.data.dir={tiny_data}"]

    def run(model, *flags):
        return command_line.run(
            evaluate.main, ["evaluate", f"--model={model}", f"--out={tmp_path / 'out'}", *data, *flags]
        )

    return run


@pytest.mark.slow
def test_evaluate_scores_on_the_data_of_a_config(folder_of, evaluated, monkeypatch, tmp_path):
    """In the model's size and colours, which the data set has not; the prompts go round."""
    calls = []

    def score(*arguments):
        calls.append(arguments)
        return {"samples": {"distance": {"value": 3.0}}}

    monkeypatch.setattr(scoring, "score", score)
    flags = ["--num=4", "--steps=2", "--config.evaluation.resize=20", "--config.evaluation.vlb_examples=8"]
    assert evaluated(folder_of("plain"), *flags, "--prompt=low", "--prompt=wool") == 0
    ((model, params, config, images, train_set, test_set, concat_images),) = calls
    assert images.shape == (4, 16, 16, 3) and concat_images is None
    assert train_set.shape[1:] == test_set.shape[1:] == (16, 16, 3)
    assert (config.evaluation.resize, test_set.split) == (20, "test")
    examples, autoencoder = test_set[np.arange(5)]["x"], {"params": params["first_stage"]}
    moments = model.first_stage.module.apply(autoencoder, examples / np.float32(127.5) - 1, method="encode")
    x_hat = model.first_stage.module.apply(autoencoder, np.split(moments, 2, axis=-1)[0], method="decode")
    reconstructions = scoring.reconstruct(model, params, examples, 4)
    np.testing.assert_allclose(reconstructions, np.clip((np.asarray(x_hat) + 1) * 127.5, 0, 255), rtol=0, atol=1)
    assert (reconstructions != examples).any((1, 2, 3)).all()
    cards = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert cards["samples"]["distance"]["value"] == 3.0 and cards["recipe"]["labels"] == [0, 1]
    (card,) = cards["model"].values()
    assert np.isfinite(card["value"]) and "given the caption" in card["method"]


def test_evaluate_refuses(folder_of, evaluated, tmp_path, capsys):
    wide = shutil.copytree(folder_of("unconditional"), tmp_path / "wide")
    edit("unet/config.json", sample_size=[4, 6])(wide)
    command = ["evaluate", f"--model={folder_of('unconditional')}"]
    cases = {
        "has no data set to be compared with; set one by --config=FILE": lambda: command_line.run(
            evaluate.main, [*command, f"--out={tmp_path}/o"]
        ),
        "--out is missing": lambda: command_line.run(evaluate.main, [*command, "--config=tests/tiny.py"]),
        "needs an image to sample from": lambda: evaluated(folder_of("inpainting"), "--prompt=low"),
        "images are 8x12; data sets are of square ones": lambda: evaluated(wide),
        "config.evaluation.resize": lambda: evaluated(wide, "--config.evaluation.resize=0"),
        "--prompt is missing": lambda: evaluated(folder_of("plain")),
    }
    for expected, run in cases.items():
        assert run() == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert expected in line
