"""The command that samples from a run: its files, its flags, and images of another size."""

import json
import re
import shutil
from dataclasses import replace

import jax
import jobs
import numpy as np
import pytest
import random_runs
from absl.flags import FloatParser
from PIL import Image

from ldm_jax import command_line, evaluate, sample
from ldm_jax.diffusion.random import initial_latents, sample_keys
from ldm_jax.errors import InputError, RunError
from ldm_jax.models.conditioning import NoConditioning, TextConditioning
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import fingerprint
from ldm_jax.sampling.from_arguments import recipe_from_arguments
from ldm_jax.sampling.image_grids import read_recipe, save_png
from ldm_jax.sampling.inputs import WEIGHTED
from ldm_jax.sampling.recipe import default_recipe, from_json, to_json, with_guidance
from ldm_jax.sampling.sample_images import sample_images
from ldm_jax.sampling.sampler import make_sampler


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with random parameters."""
    return random_runs.random_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def sampled(run, tmp_path):
    """`sampled(name, *flags)` -> the arrays of samples.npz."""

    def sampled(name, *flags, model=run):
        command = ["sample", f"--model={model}", f"--out={tmp_path / name}", "--num=8", *flags]
        assert command_line.run(sample.main, command) == 0
        return jobs.samples(tmp_path / name)

    return sampled


def test_the_samples_that_ended_a_run(trained_run, sampled, tmp_path):
    samples = sampled("out", model=trained_run)
    for name, array in jobs.samples(trained_run).items():
        np.testing.assert_array_equal(samples[name], array)
    assert (tmp_path / "out" / "denoising.gif").stat().st_size
    recipe = read_recipe(tmp_path / "out" / "samples.png")
    assert (recipe["seed"], recipe["solving"]["sampler"], recipe["step"]) == (0, "ddim", 8)


def test_classes_by_name_and_number(sampled):
    assert sampled("out", "--label=dark,1,Bright")["labels"].tolist() == [3, 1, 2, 3, 1, 2, 3, 1]


def test_initial_latents(sampled, tmp_path):
    """Those of the seed give the images of the seed; others give others."""
    z_T = np.asarray(initial_latents(sample_keys(np.uint32(3), np.arange(8)), (4, 4, 2)), np.float32)
    np.save(tmp_path / "own.npy", z_T)
    np.save(tmp_path / "other.npy", -z_T)
    plain = sampled("plain", "--seed=3")["images"]
    own, other = (sampled(name, "--seed=3", f"--init_latents={tmp_path / name}.npy")["images"]
                  for name in ("own", "other"))  # fmt: skip
    np.testing.assert_array_equal(own, plain)
    assert (other != plain).any()


@pytest.mark.parametrize(("flag", "written"), [("--save_trajectory", True), ("--nosave_trajectory", False)])
def test_the_trajectory_is_left_out_on_request(sampled, tmp_path, flag, written):
    sampled("out", flag)
    assert (tmp_path / "out" / "denoising.gif").exists() == written


def test_a_guidance_interval(sampled, tmp_path):
    sampled("out", "--guidance=9", "--guidance_interval=0.2,0.6")
    assert read_recipe(tmp_path / "out" / "samples.png")["guidance"]["interval"] == [0.2, 0.6]


def test_one_tile_is_the_whole_image(sampled):
    whole, tile = (sampled(name, *flags)["images"] for name, flags in (("whole", []), ("tile", ["--vae_tiling"])))
    np.testing.assert_array_equal(tile, whole)


@pytest.mark.slow
def test_images_of_another_size_and_in_tiles(sampled, tmp_path):
    """A run's networks are convolutional; tiles of the size that its autoencoder was trained on, in their places."""
    whole, tiles = (
        sampled(name, "--height=12", "--width=20", *flags)["images"].astype(int)
        for name, flags in (("whole", []), ("tiles", ["--vae_tiling"]))
    )
    assert whole.shape == (8, 12, 20, 1)
    elsewhere = [tiles[:, ::-1], tiles[:, :, ::-1], np.roll(tiles, 6, 1), np.roll(tiles, 6, 2), np.roll(tiles, 8, 2)]
    differences = [np.abs(whole - each).mean() for each in (tiles, *elsewhere)]
    assert 0 < differences[0] < 18 < min(differences[1:])  # of 255; the norms of random parameters differ by tile
    assert read_recipe(tmp_path / "tiles" / "samples.png")["size"] == [12, 20]


def test_the_defaults_of_the_recipe_are_those_of_the_run_s_config(run, sampled, tmp_path):
    """They act as the flags do on the same model."""
    fields = {"steps": 3, "spacing": "leading", "eta": 0.5, "guidance": 4.0, "guidance_rescale": 0.7}
    fields |= {"guidance_interval": (0.1, 0.9)}
    own = random_runs.random_run(tmp_path / "own run", {f"sampling.{name}": value for name, value in fields.items()})
    flags = [f"--{name}={value}" for name, value in fields.items() if name != "guidance_interval"]
    flags += ["--guidance_interval=0.1,0.9"]
    images = sampled("own", model=own)["images"]
    np.testing.assert_array_equal(sampled("flags", *flags)["images"], images)
    recipe, given = (read_recipe(tmp_path / name / "samples.png") for name in ("own", "flags"))
    assert (recipe["solving"], recipe["guidance"]) == (given["solving"], given["guidance"])
    guidance = {name: recipe["guidance"][name] for name in ("scale", "interval", "rescale")}
    assert guidance == {"scale": 4.0, "interval": [0.1, 0.9], "rescale": 0.7}
    for left_out in flags:
        assert (sampled("other", *(flag for flag in flags if flag != left_out))["images"] != images).any(), left_out


def test_pixels_are_bounded_by_clipping_or_by_a_quantile(tmp_path, sampled):
    """Strong guidance drives z0_hat beyond the pixels' range, where the two differ."""
    pixels = random_runs.random_run(tmp_path / "pixels", {"autoencoder.type": "none"})
    images = []
    for name, flags, threshold in (("clipped", [], 0.0), ("thresholded", ["--threshold=0.8"], 0.8)):
        images.append(sampled(name, "--guidance=30", *flags, model=pixels)["images"])
        assert read_recipe(tmp_path / name / "samples.png")["solving"]["threshold"] == threshold
    assert (images[0] != images[1]).any()


@pytest.mark.slow
def test_a_run_without_classes(tmp_path, sampled, capsys):
    plain = random_runs.random_run(tmp_path / "plain", {"data.label_key": "none"}, class_names=())
    assert (sampled("out", model=plain)["labels"] == -1).all()
    for flags, expected in ((["--guidance=2"], "needs a model with classes"), (["--label=0"], "has no classes")):
        command = ["sample", f"--model={plain}", f"--out={tmp_path / 'no'}", *flags]
        assert command_line.run(sample.main, command) == 2
        assert expected in capsys.readouterr().err


REFUSED = {  # flags -> what the line must say
    "no such class": (["--label=4"], "--label=4 is no class"),
    "an empty class": (["--label="], "is no class"),
    "no such negative class": (["--negative_label=purple"], "--negative_label=purple is no class"),
    "a height that does not divide": (["--height=9"], "--height=9 must be a multiple of 2"),
    "a threshold of latents": (["--threshold=0.9"], "--threshold=0.9 is for diffusion on pixels"),
    "a noise level": (["--noise_level=3"], "--noise_level=3 is for upscalers"),
    "steps twice": (["--timesteps=9,5", "--steps=3"], "--timesteps lists the steps; leave out --steps"),
    "timesteps in words": (["--timesteps=9,low"], "--timesteps=9,low must be whole numbers"),
    "rising timesteps": (["--timesteps=5,9"], "sampling:"),
    "too many steps": (["--steps=50"], "sampling:"),
    "a variance that was not learned": (["--sampler=ddpm", "--variance=learned"], "variance learned needs a model"),
    "churn of another solver": (["--sampler=ddim", "--churn=3"], "sampling:"),
    "two noises": (["--to_seed=3", "--init_latents=a.npy"], "both set the initial noise"),
    "two noises, one of seed 0": (["--to_seed=0", "--init_latents=a.npy"], "--init_latents and --to_seed both set"),
    "a noise and an image's": (["--to_seed=0", "--init_image=a.png", "--invert"], "--to_seed and --invert both set"),
    "a strength alone": (["--strength=0.5"], "--strength needs --init_image"),
    "a strength of 0 alone": (["--strength=0"], "--strength needs --init_image"),
    "a strength of 0 with inversion": (["--init_image=a.png", "--invert", "--strength=0"], "do not go together"),
    "a start of the refiner alone": (["--refiner_start=0"], "--refiner_start needs --refiner"),
    "a jump alone": (["--resample_jump=2"], "--resample_jump needs --resample"),
    "resampling without a mask": (["--resample=2"], "--resample needs --mask or --outpaint"),
    "a lora scale alone": (["--lora_scale=2"], "there are 1 --lora_scale for 0 --lora"),
    "fewer lora scales than files": (["--lora=a", "--lora=b", "--lora_scale=2"], "1 --lora_scale for 2 --lora"),
    "a lora scale that is not finite": (["--lora=a", "--lora_scale=nan"], "it must be a finite number"),
    "guidance that is not finite": (["--guidance=nan"], "flag --guidance=nan: it must be a finite number"),
    "endless guidance": (["--guidance=inf"], "flag --guidance=inf: it must be a finite number"),
    "churn that is not finite": (["--sampler=edm", "--churn=inf"], "--churn=inf: it must be a finite number"),
    "eta that is not finite": (["--eta=nan"], "--eta=nan: it must be a finite number"),
    "a prompt": (["--prompt=low"], "--prompt is for text-to-image models, or with --clip; this one is conditioned on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sample_refuses(case, run, tmp_path, capsys):
    flags, expected = REFUSED[case]
    command = ["sample", f"--model={run}", f"--out={tmp_path / 'out'}", *flags]
    assert command_line.run(sample.main, command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line
    assert not (tmp_path / "out").exists()


ARGUMENTS = {  # class names of the model, or None for texts; arguments of `sample` -> what the message must say
    "guidance of nothing": ((), {"guidance": 5}, "guidance=5 needs a model with classes or texts"),
    "a label of nothing": ((), {"labels": [0]}, "the model has no classes"),
    "a negative prompt of classes": ("ab", {"negative_prompt": "red"}, "negative_prompt='red' is for text-to-image"),
    "a prompt of classes": ("ab", {"prompts": "red"}, "the model takes labels; prompts are for text-to-image"),
    "labels of texts": (None, {"prompts": "red", "labels": [1]}, "labels=[1] are of a model with classes"),
    "no prompt": (None, {}, "the model takes prompts, which are missing"),
    "no text": (None, {"prompts": ["red", None]}, "prompts has None; a prompt must be a text"),
    "a prompt that is no text": (None, {"prompts": [3]}, "prompts has 3; a prompt must be a text"),
    "a negative prompt that is no text": (None, {"prompts": "a", "negative_prompt": 3}, "negative_prompt has 3"),
    "no samples": ("ab", {"num": 0}, "num is 0; it must be a whole number, 1 or more"),
    "fewer samples than none": ("ab", {"num": -1}, "num is -1"),
    "a number of samples that is not whole": ("ab", {"num": 2.0}, "num is 2.0"),
    "a negative seed": ("ab", {"seed": -1}, "seed is -1; it must be a whole number, from 0 to 4294967295"),
    "a seed of more than 32 bits": ("ab", {"seed": 2**32}, "seed is 4294967296"),
    "no steps": ("ab", {"steps": 0}, "steps is 0; it must be a whole number, 1 or more"),
    "a size that does not divide": ("ab", {"size": (8, 11)}, "width=11 must be a multiple of 2, the pixels of"),
    "a size of one pixel": ("ab", {"size": (1, 1)}, "height=1 must be a multiple of 2"),
    "a size of nothing": ("ab", {"size": (0, 8)}, "height is 0; it must be a whole number, 1 or more"),
    "one side": ("ab", {"size": 8}, "size is 8; it must be (height, width) in pixels"),
    "three sides": ("ab", {"size": (8, 8, 1)}, "size is (8, 8, 1); it must be (height, width)"),
    "a class beyond the last": ("ab", {"labels": 2}, "labels=2 is no class; the model has 0 a, 1 b"),
    "classes one by one": ("ab", {"labels": "ab"}, "labels=ab is no class"),
    "no class": ("ab", {"labels": []}, "is no class"),
    "negative guidance": ("ab", {"guidance": -1}, "guidance is -1; it must be a finite number, 0 or more"),
    "guidance that is no number": ("ab", {"guidance": "strong"}, "guidance is 'strong'"),
    "a negative batch": ("ab", {"batch_size": -1}, "batch_size is -1; it must be a whole number, 1 or more"),
    "an empty batch": ("ab", {"batch_size": 0}, "batch_size is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_are_refused(case):
    class_names, arguments, expected = ARGUMENTS[case]
    model, params = random_runs.random_model(class_names=tuple(class_names or ()))
    if class_names is None:
        model = replace(model, conditioning=TEXTS)
    with pytest.raises(InputError, match=re.escape(expected)):
        sample(model, params, **arguments)


def test_labels_of_arguments_are_one_or_several():
    model, _ = random_runs.random_model(class_names=("12", "1", "2", "red"))
    for labels, expected in (
        (2, [2]),
        ("12", [0]),
        ("red", [3]),
        ("red,2", [3, 2]),
        (("1", 3), [1, 3]),
        (None, [0, 1, 2, 3]),
    ):
        recipe = recipe_from_arguments(model, labels=labels)
        assert (recipe.labels, recipe.num) == (expected, len(expected))
    recipe = recipe_from_arguments(
        model, labels=np.int64(3), num=np.int64(2), seed=np.uint32(4), steps=np.int32(3), size=np.array([8, 12])
    )
    assert from_json(json.loads(json.dumps(to_json(recipe))), "") == recipe


def test_every_number_flag_must_be_finite():
    """The kind of the cases above: also of flags that are added later."""
    values = sample.define_flags()
    numbers = [name for name in values if isinstance(getattr(values[name], "parser", None), FloatParser)]
    assert {"guidance", "lora_scale", "strength", "classifier_scale"} <= set(numbers)
    assert all(isinstance(values[name].parser, command_line.Number) for name in numbers)


@pytest.fixture
def three_devices(four_devices, monkeypatch):
    """The test uses three devices, over which a batch of 8 does not divide."""
    make_sampler.cache_clear()
    for name in ("devices", "local_devices"):
        function = getattr(jax, name)
        monkeypatch.setattr(jax, name, lambda *args, function=function, **options: function(*args, **options)[:3])
    for name in ("device_count", "local_device_count"):
        monkeypatch.setattr(jax, name, lambda *args, **options: 3)
    yield
    make_sampler.cache_clear()


def test_the_own_batch_size_of_a_model_need_not_divide_over_the_devices(run, three_devices, tmp_path):
    """It is rounded down; samples do not depend on it. That of --batch_size is as it is written, or refused."""
    command = ["sample", f"--model={run}", "--nosave_trajectory"]
    assert command_line.run(sample.main, [*command, f"--out={tmp_path / 'a'}", "--num=8"]) == 0
    model, params = load(run)
    by_arguments = sample(model, params, num=8).astype(int)
    assert np.abs(jobs.samples(tmp_path / "a")["images"] - by_arguments).max() <= 1


def test_a_batch_size_that_does_not_divide_over_the_devices_is_refused(run, three_devices, tmp_path, capsys):
    model, params = load(run)
    save_png(Image.new("L", (8, 8)), tmp_path / "a.png", recorded(model, params))
    command = ["sample", f"--model={run}", f"--out={tmp_path / 'out'}", "--batch_size=4"]
    expected = "batch_size=4 does not divide over 3 devices; it must be a multiple of 3"
    for flags in ((), (f"--from_recipe={tmp_path / 'a.png'}",)):
        assert command_line.run(sample.main, [*command, *flags]) == 2
        assert expected in capsys.readouterr().err
    with pytest.raises(InputError, match=expected):
        sample(model, params, batch_size=4)


def recorded(model, params):
    """The recipe of a model's defaults, as in a PNG."""
    return {"model": fingerprint(model, params)} | to_json(default_recipe(model, 4, 0, [0], []))


def test_a_run_folder_is_no_output(run, tmp_path, capsys):
    """`sample` would overwrite the samples of the run; so would `evaluate`."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for command in (sample.main, evaluate.main):
        assert command_line.run(command, ["command", f"--model={run}", f"--out={run}", "--num=4"]) == 2
        assert "is a run folder, with samples of its own; choose another, e.g." in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_output_that_cannot_be_written(run, capsys):
    """Before anything is loaded."""
    assert command_line.run(sample.main, ["sample", "--model=nowhere", "--out=/proc/out"]) == 2
    assert "--out=/proc/out cannot be written to: /proc" in capsys.readouterr().err


def with_bias(params, part, value):
    """The parameters with the bias of one output channel of the last convolution changed."""
    bias = params[part]["conv_out"]["bias"] if part == "denoiser" else params[part]["decoder"]["conv_out"]["bias"]
    bias = np.full_like(bias, value)
    if part == "denoiser":
        return params | {part: params[part] | {"conv_out": params[part]["conv_out"] | {"bias": bias}}}
    decoder = params[part]["decoder"] | {"conv_out": params[part]["decoder"]["conv_out"] | {"bias": bias}}
    return params | {part: params[part] | {"decoder": decoder}}


def test_black_samples_are_not_written_without_a_word(run, capsys):
    model, params = load(run)
    recipe = default_recipe(model, 4, 0, [0], [])
    sample_images(model, params, recipe, batch_size=4, trajectory=False)
    assert "warning" not in capsys.readouterr().err
    for value in (-1e4, np.nan):
        black = sample_images(model, with_bias(params, "first_stage", value), recipe, batch_size=4, trajectory=False)
        assert not black.images.any()
        assert "4 of 4 samples are black or not finite, the first is sample 0" in capsys.readouterr().err


def test_samples_none_of_which_is_finite_are_an_error(run):
    model, params = load(run)
    recipe = default_recipe(model, 4, 0, [0], [])
    with pytest.raises(RunError, match="no sample is finite, nothing was written; try --dtype=float32"):
        sample_images(model, with_bias(params, "denoiser", np.nan), recipe, batch_size=4, trajectory=False)


def test_no_guidance_of_texts(capsys):
    """At most 1 is none, as in diffusers; the empty prompt and other guidance keep the unconditional model."""
    text, plain = (replace(random_runs.random_model()[0], conditioning=c) for c in (TEXTS, NoConditioning()))
    recipe = default_recipe(plain, 2, 0, [0, 1], ["a cat", ""])

    def scale(model, recipe, **guidance):
        return with_guidance(model, recipe._replace(guidance=recipe.guidance._replace(**guidance))).guidance.scale

    assert [scale(text, recipe, scale=s) for s in (0.0, 0.5, 1.0, 1.5, 7.5)] == [1.0, 1.0, 1.0, 1.5, 7.5]
    assert capsys.readouterr().err.count("warning: a guidance scale of ") == 2
    assert scale(text, recipe._replace(prompts=["", ""]), scale=0.0) == 0.0
    assert scale(text, recipe, scale=0.0, clip="runs/clip") == 0.0
    assert scale(text, recipe, scale=0.0, classifier="runs/classifier") == 0.0
    assert scale(plain, recipe, scale=0.0) == 0.0
    assert capsys.readouterr().err == ""


TEXTS = TextConditioning((), (), False)


@pytest.mark.slow
def test_single_images(run, sampled, tmp_path):
    """Names carry index, seed and condition; those of earlier samples are replaced."""
    arrays = sampled("out", "--save_each", "--label=dark,bright", "--seed=5", "--num=3")
    folder = tmp_path / "out" / "images"
    names = ["00000_seed5_dark.png", "00001_seed5_bright.png", "00002_seed5_dark.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name, image in zip(names, arrays["images"]):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / name)), image[..., 0])
        assert read_recipe(folder / name)["seed"] == 5
    sampled("out", "--save_each", "--num=1")
    assert [path.name for path in folder.iterdir()] == ["00000_seed0_horizontal.png"]
    sampled("plain")
    assert not (tmp_path / "plain" / "images").exists()


def test_a_run_that_is_not_finished_says_so(run, sampled, tmp_path, capsys):
    half = shutil.copytree(run, tmp_path / "half")
    fields = json.loads((half / "config.json").read_text())
    fields["diffusion"]["steps"] = 4_000
    (half / "config.json").write_text(json.dumps(fields))
    sampled("whole")
    assert "is trained for" not in capsys.readouterr().err
    sampled("out", model=half)
    assert f"note: --model={half} is trained for 8 of 4,000 steps so far" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["a (red:1.3) cat", "<lora:style:0.8> a cat"])
def test_weights_in_prompts_are_said_to_be_text(prompt):
    assert WEIGHTED.search(prompt) and not WEIGHTED.search("a (red) cat at 3:1, (small)")


def test_out_of_memory_is_one_line(capsys):
    for error in (MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")):

        def fails(argv, error=error):
            raise error

        assert command_line.run(fails, ["sample"]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("sample: out of memory: lower the batch size (config.autoencoder.batch_size")
    with pytest.raises(jax.errors.JaxRuntimeError):
        command_line.run(lambda argv: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: other")), ["sample"])
