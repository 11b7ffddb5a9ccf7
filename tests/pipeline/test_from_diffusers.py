"""Diffusers folders drawn by the command: what pictures depend on, and what is refused."""

import json
import shutil

import diffusers_folder
import jax
import jobs
import numpy as np
import pytest
from PIL import Image

from ldm_jax import command_line, evaluate, sample
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.random import initial_latents, low_resolution_noise, sample_keys
from ldm_jax.evaluation import scoring
from ldm_jax.interop.scheduler_config import Scheduler
from ldm_jax.models.conditioning import make_tau
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.pipeline import model as pipeline_model
from ldm_jax.pipeline.upscaler import Upscaling, noised
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling import generate
from ldm_jax.sampling.image_grids import read_recipe


KINDS = {
    "plain": diffusers_folder.write_stable_diffusion,
    "xl": lambda folder: diffusers_folder.write_stable_diffusion(folder, xl=True),
    "inpainting": lambda folder: diffusers_folder.write_stable_diffusion(folder, inpainting=True),
    "upscaling": lambda folder: diffusers_folder.write_stable_diffusion(folder, upscaling=True),
    "unconditional": diffusers_folder.write_unconditional,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(kind): made once; to be read or copied."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = KINDS[kind](tmp_path_factory.mktemp(kind) / "model")
        return made[kind]

    return make


@pytest.fixture
def draw(tmp_path):
    """draw(model, name, *flags) -> samples.npz, of four steps."""

    def run(model, name, *flags):
        command = ["sample", f"--model={model}", f"--out={tmp_path / name}", "--steps=4", *flags]
        assert command_line.run(sample.main, command) == 0
        return jobs.samples(tmp_path / name)

    return run


def test_prompts_and_negative_prompts_matter(folder_of, draw, tmp_path):
    model = folder_of("plain")
    drawn = draw(model, "two", "--prompt=low", "--prompt=lower")
    assert drawn["images"].shape == (2, 16, 16, 3)
    assert drawn["labels"].tolist() == [0, 1]
    recipe = read_recipe(tmp_path / "two" / "samples.png")
    assert (recipe["prompts"], recipe["guidance"], recipe["sampler"]) == (["low", "lower"], 7.5, "ddim")
    assert not (tmp_path / "two" / "denoising.gif").exists()  # unless asked for: it decodes a lot

    def changes(name, *flags):
        images = draw(model, name, *flags)["images"].astype(int)
        return np.abs(images - drawn["images"]).max((1, 2, 3)).tolist()

    same, other = changes("prompt", "--prompt=low", "--prompt=wool")
    assert same <= 1 and other > 2  # whatever else is drawn
    assert min(changes("negative", "--prompt=low", "--prompt=lower", "--negative_prompt=wool")) > 2


def test_more_pictures_than_prompts(folder_of, draw):
    drawn = draw(folder_of("plain"), "out", "--prompt=low", "--prompt=lower", "--num=5", "--save_trajectory")
    assert drawn["labels"].tolist() == [0, 1, 0, 1, 0]
    assert len(drawn["images"]) == 5


def test_a_recipe_makes_the_pictures_again(folder_of, draw, tmp_path):
    flags = ["--prompt=low", "--negative_prompt=lower", "--num=4", "--sampler=euler", "--dtype=bfloat16"]
    first = draw(folder_of("plain"), "first", *flags)
    command = ["sample", f"--model={folder_of('plain')}", f"--from_recipe={tmp_path / 'first' / 'samples.png'}"]
    assert command_line.run(sample.main, [*command, f"--out={tmp_path / 'again'}", "--dtype=bfloat16"]) == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "again")["images"], first["images"])
    assert (
        command_line.run(sample.main, [*command, f"--out={tmp_path / 'no'}"]) == 2
    )  # in float32 it is another picture


def test_bfloat16_is_near_float32(folder_of, draw):
    exact, half = (draw(folder_of("plain"), t, "--prompt=low", f"--dtype={t}") for t in ("float32", "bfloat16"))
    difference = np.abs(exact["images"].astype(int) - half["images"])
    assert 0 < difference.mean() < 10


def test_xl_tells_nothing_from_the_empty_text(folder_of, draw):
    """No negative prompt is zeros, an empty one is not; a model may say that both are the empty text."""
    nothing, empty = (draw(folder_of("xl"), name, "--prompt=low", *flags)["images"]
                      for name, flags in (("nothing", []), ("empty", ["--negative_prompt="])))  # fmt: skip
    assert (nothing != empty).any()


def test_a_folder_may_say_that_nothing_is_the_empty_text(folder_of, draw, tmp_path):
    other = shutil.copytree(folder_of("xl"), tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    nothing, empty = (draw(other, name, "--prompt=low", *flags)["images"]
                      for name, flags in (("nothing", []), ("empty", ["--negative_prompt="])))  # fmt: skip
    np.testing.assert_array_equal(nothing, empty)


def test_xl_is_told_the_size(folder_of):
    model = pipeline_load.load(folder_of("xl"))
    tau = jax.jit(make_tau(model.pretrained.encoders))
    texts, cut = model.pretrained.texts(["low"], None, (16, 24), -1)
    told = tau(model.params["conditioner"], texts)
    assert cut == 0
    np.testing.assert_array_equal(told["added"].time_ids, [[16, 24, 0, 0, 16, 24]] * 2)
    assert told["context"].shape == (2, 8, 32)
    assert np.asarray(told["context"][0]).any() and not np.asarray(told["context"][1]).any()
    assert np.asarray(told["added"].pooled[0]).any() and not np.asarray(told["added"].pooled[1]).any()


def test_an_unconditional_model(folder_of, draw):
    assert draw(folder_of("unconditional"), "out", "--num=3", "--batch_size=4")["images"].shape == (3, 16, 16, 3)


@pytest.fixture
def files(tmp_path):
    """A picture and a mask of its right half."""
    rng = np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


@pytest.fixture
def small_tiles(folder_of, tmp_path):
    """A model whose autoencoder is for pictures of 8 pixels."""
    folder = shutil.copytree(folder_of("plain"), tmp_path / "tiles")
    edit("vae/config.json", sample_size=8)(folder)
    return folder


def test_a_model_of_wide_pictures_and_a_recipe_of_another_size(small_tiles, draw, tmp_path):
    wide = shutil.copytree(small_tiles, tmp_path / "wide")
    edit("unet/config.json", sample_size=[6, 10])(wide)
    drawn = draw(wide, "own", "--prompt=low", "--vae_tiling")["images"]
    assert drawn.shape == (1, 12, 20, 3)
    recipe = tmp_path / "own" / "samples.png"
    assert (read_recipe(recipe)["size"], read_recipe(recipe)["vae_tiling"]) == ([12, 20], True)
    command = ["sample", f"--model={small_tiles}", f"--from_recipe={recipe}", f"--out={tmp_path / 'again'}"]
    assert command_line.run(sample.main, command) == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "again")["images"], drawn)


def test_large_pictures_in_tiles(small_tiles):
    """Nearly the same pictures, and exactly those where they are no larger than a tile."""
    model = pipeline_load.load(small_tiles)
    params, z = replicate(model.params), np.random.default_rng(0).standard_normal((4, 4, 10, 4)).astype(np.float32)
    for width, off in ((8, (0, 0)), (20, (0.1, 30))):
        wide = pipeline_model.at_size(model, (8, width))
        whole, tiles = (
            generate.generator_of(wide, 4, vae_tiling=tiling).decode(params, z[:, :, : width // 2]).astype(int)
            for tiling in (False, True)
        )
        assert whole.shape == (4, 8, width, 3)
        assert off[0] <= np.abs(tiles - whole).mean() <= off[1]


def test_pictures_are_cropped_to_another_size(folder_of, draw, files):
    edits = [f"--init_image={files}/image.png", f"--mask={files}/mask.png", "--prompt=low", "--height=8"]
    images = draw(folder_of("inpainting"), "inpainting", *edits)["images"]
    assert images.shape == (1, 8, 16, 3)  # the width is the model's own
    np.testing.assert_array_equal(images[0, :, :8], np.asarray(Image.open(files / "image.png"))[4:12, :8])


def test_inpainting_keeps_the_rest_to_the_bit(folder_of, draw, files):
    original = np.asarray(Image.open(files / "image.png"))
    edit = [f"--init_image={files}/image.png", f"--mask={files}/mask.png", "--prompt=low", "--num=2"]
    for kind in ("inpainting", "plain"):  # a model for it; and any model, by blending
        images = draw(folder_of(kind), kind, *edit)["images"]
        np.testing.assert_array_equal(images[:, :, :8], np.broadcast_to(original[:, :8], (2, 16, 8, 3)))
        assert (images[0, :, 8:] != images[1, :, 8:]).any()


def test_a_picture_four_times_as_large(folder_of, draw, tmp_path):
    """Of any size; how much it is noised matters."""
    small = np.random.default_rng(0).integers(0, 255, (6, 10, 3), np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    flags = [f"--map={tmp_path}/small.png", "--prompt=low"]
    drawn = draw(folder_of("upscaling"), "out", *flags, "--num=2")["images"].astype(int)
    assert drawn.shape == (2, 24, 40, 3)
    recipe = read_recipe(tmp_path / "out" / "samples.png")
    assert (recipe["noise_level"], recipe["guidance"], recipe["size"]) == (20, 9.0, [24, 40])
    other = draw(folder_of("upscaling"), "more noise", *flags, "--num=2", "--noise_level=350")["images"]
    assert np.abs(other - drawn).max((1, 2, 3)).min() > 1


def test_an_upscalers_latents_have_the_scale_of_the_pipeline(folder_of):
    assert "0.18215" in (folder_of("upscaling") / "vae" / "config.json").read_text()
    np.testing.assert_array_equal(
        pipeline_load.load(folder_of("upscaling")).params["scale"], np.full(4, 0.08333, np.float32)
    )


def test_a_small_picture_is_noised_by_the_level():
    maps, alpha_bar = np.full((1, 4, 6, 3), 0.5, np.float32), np.array([1.0, 0.36])
    upscaling = Upscaling(Process.variance_preserving(alpha_bar), 1, {})
    np.testing.assert_array_equal(noised(maps, 0, upscaling, 3, 2), maps.repeat(2, 0))
    keys = sample_keys(np.uint32(3), np.arange(2))
    noise = (noised(maps, 1, upscaling, 3, 2) - 0.3) / 0.8
    np.testing.assert_allclose(noise, low_resolution_noise(keys, maps.shape[1:]), atol=1e-6)
    assert abs(np.corrcoef(noise.ravel(), np.ravel(initial_latents(keys, maps.shape[1:])))[0, 1]) < 0.5


def test_given_noise_is_what_a_picture_is_noised_by(folder_of, draw, files):
    image = [f"--init_image={files}/image.png", "--strength=0.75", "--prompt=low"]
    z_T = np.random.default_rng(0).standard_normal((2, 1, 8, 8, 4)).astype(np.float32)
    for name, noise in zip("ab", z_T):
        np.save(files / f"{name}.npy", noise)
    a, b = (draw(folder_of("plain"), name, *image, f"--init_latents={files}/{name}.npy")["images"] for name in "ab")
    assert (a != b).any()
    assert (a != draw(folder_of("plain"), "no image", "--prompt=low", f"--init_latents={files}/a.npy")["images"]).any()


def test_a_scheduler_scales_the_noise_that_is_all_there_is(folder_of, draw, files, monkeypatch):
    """Not what a picture is noised by, nor the noise that it was inverted to."""

    def images(name):
        image = f"--init_image={files}/image.png"
        kinds = {"plain": [], "noised": [image, "--strength=0.5"], "inverted": [image, "--invert", "--guidance=1"]}
        return {k: draw(folder_of("plain"), f"{name} {k}", "--prompt=low", *v)["images"] for k, v in kinds.items()}

    before = images("before")
    monkeypatch.setattr(Scheduler, "start", lambda scheduler, table: 3.0)
    after = images("after")
    assert (before["plain"] != after["plain"]).any()
    for kind in ("noised", "inverted"):
        np.testing.assert_array_equal(before[kind], after[kind])


def test_a_long_prompt_is_cut_with_a_warning(folder_of, draw, capsys):
    cut = draw(folder_of("plain"), "cut", "--prompt=" + "low " * 3000)["images"]
    assert "warning: 1 of the prompts are longer than the model reads" in capsys.readouterr().err
    shorter = draw(folder_of("plain"), "shorter", "--prompt=" + "low " * 6)["images"]
    np.testing.assert_array_equal(cut, shorter)
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


MAP = "--map=FOLDER/map.png"
WEIGHTS = "diffusion_pytorch_model.safetensors"
REFUSED = {  # kind, what is done to the folder, flags -> what the line must say
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
    "another width": ("plain", edit("unet/config.json", block_out_channels=[24]), [], "of the wrong shape"),
    "no size": ("plain", edit("unet/config.json", sample_size=None), [], "sample_size is None; it must be"),
    "a size in words": ("plain", edit("unet/config.json", sample_size="large"), [], "sample_size is large; it must be"),
    "a size of three": ("plain", edit("unet/config.json", sample_size=[8, 8, 8]), [], "sample_size is [8, 8, 8]"),
    "a height that does not halve": ("plain", None, ["--height=17"], "--height=17 must be a multiple of 2"),
    "no height": ("plain", None, ["--height=0"], "--height"),
    "a width in words": ("plain", None, ["--width=wide"], "--width"),
    "tiles of a codebook's": ("unconditional", None, ["--vae_tiling"], "is for diffusers models with an AutoencoderKL"),
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
        or edit("unet/config.json", cross_attention_dim=8)(f), [], "of the wrong shape"),
    "no vocabulary": ("plain", remove("tokenizer/vocab.json"), [], "vocabulary is missing"),
    "a damaged vocabulary": ("plain", cut_short("tokenizer/vocab.json"), [], "damaged"),
    "a text encoder of another kind": (
        "plain", edit("text_encoder/config.json", architectures=["T5EncoderModel"]), [], "architectures"),
    "no scheduler": ("plain", remove("scheduler"), [], "scheduler"),
    "an unknown scheduler": (
        "plain", edit("scheduler/scheduler_config.json", _class_name="Fancy"), [], "class 'Fancy' is not supported"),
    "an unknown schedule": (
        "plain", edit("scheduler/scheduler_config.json", beta_schedule="sigmoid"), [], "beta_schedule"),
    "no prompt": ("plain", None, [], "--prompt is missing"),
    "a class": ("plain", None, ["--label=3"], "the model knows no classes"),
    "a prompt for none": ("unconditional", None, ["--prompt=low"], "--prompt is for models of texts"),
    "a negative prompt for none": ("unconditional", None, ["--negative_prompt=low"], "draws without being told"),
    "nothing to inpaint": ("inpainting", None, [], "it must be given a picture and what to draw"),
    "nothing to enlarge": ("upscaling", None, [], "this model enlarges; it must be given a small picture: --map"),
    "no picture to enlarge": ("upscaling", None, ["--map=FOLDER/unet/config.json"], "config.json: not a picture"),
    "a size beside the map's": ("upscaling", None, [MAP, "--height=64"], "is 4 times as large as --map; leave it out"),
    "more noise than it knows": ("upscaling", None, [MAP, "--noise_level=351"], "must be from 0 to 350 for this model"),
    "less than no noise": ("upscaling", None, [MAP, "--noise_level=-1"], "--noise_level"),
    "noise for no upscaler": ("plain", None, ["--noise_level=20"], "is for diffusers' upscalers; this model is none"),
    "a map for no upscaler": ("plain", None, [MAP], "this one takes no map"),
    "an upscaler of more levels": (
        "upscaling", edit("model_index.json", max_noise_level=400), [MAP], "max_noise_level is 400"),
    "an upscaler without levels": (
        "upscaling", edit("unet/config.json", num_class_embeds=300), [MAP], "of the wrong shape"),
    "an upscaler that sees nothing": (
        "upscaling", edit("model_index.json", _class_name="StableDiffusionPipeline"), [], "UNet of 7 to 4"),
    "no upscaler at all": (
        "plain", edit("model_index.json", _class_name="StableDiffusionUpscalePipeline"), [], "no low_res_scheduler"),
    "an unconditional network": (
        "unconditional", edit("model_index.json", _class_name="StableDiffusionPipeline", vae=["a", "b"],
                              text_encoder=["a", "b"]), [], "the class of its UNet"),
    "a picture that is none": ("plain", None, ["--init_image=FOLDER/unet/config.json"], "not a picture"),
    "an unknown type": ("plain", None, ["--dtype=float8"], "--dtype"),
    "more steps than there are": ("plain", None, ["--steps=5000"], "steps"),
    "a sampler without what it needs": ("plain", None, ["--sampler=plms"], "skip_prk_steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_sample_refuses(case, folder_of, tmp_path, capsys):
    kind, damage, flags, expected = REFUSED[case]
    folder = shutil.copytree(folder_of(kind), tmp_path / "model")
    if damage:
        damage(folder)
    Image.new("RGB", (4, 4)).save(folder / "map.png")
    flags = [flag.replace("FOLDER", str(folder)) for flag in flags]
    if kind != "unconditional" and case != "no prompt":
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


def test_evaluate_scores_on_the_data_of_a_config(folder_of, evaluated, monkeypatch, tmp_path):
    """In the model's size and colours, which the data set has not; the prompts go round."""
    seen = []

    def score(model, images, train_set, test_set, given):
        seen.append((model, images, train_set, test_set, given))
        return {"samples": {"distance": {"value": 3.0}}}

    monkeypatch.setattr(scoring, "score", score)
    flags = ["--num=4", "--steps=2", "--config.evaluation.resize=20"]
    assert evaluated(folder_of("plain"), *flags, "--prompt=low", "--prompt=wool") == 0
    ((model, images, train_set, test_set, given),) = seen
    assert images.shape == (4, 16, 16, 3) and given is None
    assert train_set.shape[1:] == test_set.shape[1:] == (16, 16, 3)
    assert (model.config.evaluation.resize, test_set.split) == (20, "test")
    examples = test_set[np.arange(4)]["x"]
    assert pipeline_model.reconstructions(model, examples, 4).shape == examples.shape
    cards = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert cards["samples"]["distance"]["value"] == 3.0 and cards["recipe"]["labels"] == [0, 1]


def test_evaluate_refuses(folder_of, evaluated, tmp_path, capsys):
    wide = shutil.copytree(folder_of("unconditional"), tmp_path / "wide")
    edit("unet/config.json", sample_size=[4, 6])(wide)
    command = ["evaluate", f"--model={folder_of('unconditional')}"]
    cases = {
        "knows no data set; say by --config=FILE what its pictures are": lambda: command_line.run(
            evaluate.main, [*command, f"--out={tmp_path}/o"]
        ),
        "--out is missing": lambda: command_line.run(evaluate.main, [*command, "--config=tests/tiny.py"]),
        "draws from a picture that it is given": lambda: evaluated(folder_of("inpainting"), "--prompt=low"),
        "draws pictures of 8x12; data sets are of square ones": lambda: evaluated(wide),
        "config.evaluation.resize": lambda: evaluated(wide, "--config.evaluation.resize=0"),
        "--prompt is missing": lambda: evaluated(folder_of("plain")),
    }
    for expected, run in cases.items():
        assert run() == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert expected in line
