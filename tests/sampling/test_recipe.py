"""Recipes: every choice of a command line in a PNG, and the same samples from it again."""

import jobs
import numpy as np
import pytest
import random_runs
from PIL import Image, PngImagePlugin

from ldm_jax import command_line, sample
from ldm_jax.errors import InputError
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import fingerprint
from ldm_jax.sampling import from_flags
from ldm_jax.sampling.image_grids import read_recipe, save_png
from ldm_jax.sampling.recipe import (
    ConcatInput,
    Edit,
    Guidance,
    Recipe,
    Solving,
    default_recipe,
    from_json,
    from_png,
    to_json,
)

RECIPE = Recipe(
    num=5,
    seed=3,
    labels=[2, 0],
    prompts=[],
    size=[8, 16],
    dtype="float32",
    solving=Solving("edm", 4, [19, 9, 5, 0], churn=2.0),
    guidance=Guidance(3.0, [0.1, 0.9], 0.7, negative_label=1),
    edit=Edit(init_image="a.png", strength=0.5, to_seed=0),
    concat=ConcatInput(split="test"),
)
FLAT = {  # a recipe of version 0.1
    "num": 3, "labels": [1], "prompts": [], "seed": 3, "sampler": "ddpm", "steps": 7, "spacing": "trailing",
    "guidance": 3.0, "guidance_interval": [0.1, 0.9], "guidance_rescale": 0.0, "eta": 0.0, "churn": 0.0,
    "variance": "fixed_large", "threshold": 0.0, "negative_label": -1, "negative_prompt": "", "classifier": "",
    "classifier_scale": 0.0, "clip": "", "clip_scale": 0.0, "init_latents": "", "init_image": "a.png", "strength": 0.6,
    "mask": "", "outpaint": "", "resample": 1, "resample_jump": 1, "invert": False, "to_image": "", "to_seed": -1,
    "to_prompt": None, "map": "", "map_split": "", "size": [8, 8], "vae_tiling": False, "noise_level": -1,
    "dtype": "float32",
}  # fmt: skip


def test_a_recipe_is_nested_json():
    fields = to_json(RECIPE)
    assert fields["guidance"]["scale"] == 3.0 and fields["edit"]["mask"] is None
    assert from_json(fields, "") == RECIPE


def test_fields_with_defaults_may_lack_and_others_not():
    """So that a recipe stays readable when there are more fields."""
    fields = to_json(RECIPE)
    del fields["edit"], fields["guidance"]["clip"], fields["vae_tiling"]
    assert from_json(fields, "") == RECIPE._replace(edit=Edit())
    del fields["guidance"]["interval"]
    with pytest.raises(InputError, match=r"x\.png is of another version: its recipe lacks interval"):
        from_json(fields, "x.png")


def test_a_flat_recipe_without_sentinels():
    recipe = from_json(FLAT, "")
    assert recipe.solving == Solving("ddpm", 7, "trailing", variance="fixed_large")
    assert recipe.guidance == Guidance(3.0, [0.1, 0.9], negative_prompt="")
    assert recipe.edit == Edit(init_image="a.png", strength=0.6)
    assert recipe.concat == ConcatInput()
    other = FLAT | {"negative_label": 2, "to_seed": 0, "map_split": "test", "noise_level": 20, "map": "m.png"}
    recipe = from_json(other, "")
    assert (recipe.guidance.negative_label, recipe.edit.to_seed) == (2, 0)
    assert recipe.concat == ConcatInput("m.png", "test", 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with random parameters."""
    return random_runs.random_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def files(tmp_path):
    """Two images and a mask whose right half is white: 8x8."""
    ramp = np.tile(np.linspace(0, 200, 8).astype(np.uint8), (8, 1))
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    for name, image in (("a", ramp), ("b", ramp.T), ("mask", mask)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    return tmp_path


def run_sample(run, out, *flags, status=0):
    command = ["sample", f"--model={run}", f"--out={out}", *flags]
    assert command_line.run(sample.main, command) == status


def test_a_recipe_makes_the_samples_again(run, files):
    flags = [f"--init_image={files}/a.png", f"--mask={files}/mask.png", "--sampler=ddpm", "--steps=7", "--seed=3",
             "--resample=2", "--label=bright,dark", "--guidance=3", "--guidance_interval=0.1,0.9"]  # fmt: skip
    run_sample(run, files / "first", "--num=8", *flags)
    recipe = files / "first" / "samples.png"
    run_sample(run, files / "again", f"--from_recipe={recipe}")
    np.testing.assert_array_equal(jobs.samples(files / "again")["images"], jobs.samples(files / "first")["images"])
    assert read_recipe(files / "again" / "samples.png") == read_recipe(recipe)


@pytest.mark.slow
def test_a_flat_recipe_makes_the_same_samples(run, files):
    flags = ["--sampler=ddpm", "--steps=7", "--seed=3", "--guidance=3", "--guidance_interval=0.1,0.9",
             "--variance=fixed_large", f"--init_image={files}/a.png", "--label=1", "--num=3"]  # fmt: skip
    run_sample(run, files / "first", *flags)
    recorded = read_recipe(files / "first" / "samples.png")
    flat = FLAT | {"init_image": f"{files}/a.png", "model": recorded["model"], "inputs": recorded["inputs"]}
    save_png(Image.new("L", (8, 8)), files / "old.png", flat)
    run_sample(run, files / "again", f"--from_recipe={files}/old.png")
    np.testing.assert_array_equal(jobs.samples(files / "again")["images"], jobs.samples(files / "first")["images"])


def test_a_recipe_of_changed_inputs_is_refused(run, files, capsys):
    run_sample(run, files / "first", "--num=2", f"--init_image={files}/a.png")
    (files / "b.png").replace(files / "a.png")
    run_sample(run, files / "again", f"--from_recipe={files}/first/samples.png", status=2)
    assert f"was sampled from another {files}/a.png than the one that is there now" in capsys.readouterr().err
    assert not (files / "again").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--from_recipe=nowhere.png"], "nowhere.png: cannot be read as an image: No such file"),
        (["--from_recipe=FILES/a.png"], "has no recipe"),
        (["--from_recipe=FILES/a.png", "--steps=3"], "--from_recipe has the whole recipe; leave out --steps"),
    ],
)
def test_no_recipe(flags, expected, files, run, capsys):
    flags = [flag.replace("FILES", str(files)) for flag in flags]
    run_sample(run, files / "out", *flags, status=2)
    assert expected in capsys.readouterr().err
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (to_json(RECIPE) | {"model": "0123"}, r"was sampled from another model \(0123\) than --model"),
        ({"seed": 3}, "is of another version: its recipe lacks"),
        (to_json(RECIPE._replace(dtype="bfloat16")), "was sampled in bfloat16; add --dtype=bfloat16"),
    ],
)
def test_a_recipe_of_another_model_or_version(recipe, expected, run, tmp_path):
    model, params = load(run)
    save_png(Image.new("L", (8, 8)), tmp_path / "it.png", {"model": fingerprint(model, params)} | recipe)
    with pytest.raises(InputError, match=expected):
        from_png(tmp_path / "it.png", model, params)


@pytest.mark.parametrize("chunk", ["[]", "3", "null", "{"])
def test_an_image_with_another_chunk_has_no_recipe(chunk, run, files, capsys):
    text = PngImagePlugin.PngInfo()
    text.add_text("recipe", chunk)
    Image.new("L", (8, 8)).save(files / "it.png", pnginfo=text)
    run_sample(run, files / "out", f"--from_recipe={files}/it.png", status=2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("it.png: this image has no recipe; those that ldm_jax.sample writes have one")


@pytest.mark.parametrize(("changes", "expected"), [
    ({"labels": [99]}, "has a damaged recipe: its labels have 99; they must be below 4"),
    ({"size": [8, 9]}, "has a damaged recipe: width=9 must be a multiple of 2"),
    ({"num": 0}, "has a damaged recipe: its num is 0"),
    ({"inputs": None}, "has a damaged recipe: its inputs are None"),
    ({"edit": {"invert": True}}, "has a damaged recipe: its invert needs an init_image"),
    ({"edit": {"to_prompt": "low"}}, "has a damaged recipe: its to_prompt needs one prompt"),
])  # fmt: skip
def test_a_recipe_that_does_not_fit_the_model_is_refused(changes, expected, run, files, capsys):
    model, params = load(run)
    recipe = to_json(default_recipe(model, 2, 0, [0], [])) | {"model": fingerprint(model, params)}
    save_png(Image.new("L", (8, 8)), files / "it.png", recipe | changes)
    run_sample(run, files / "out", f"--from_recipe={files}/it.png", status=2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line and "--from_recipe=" in line


@pytest.mark.parametrize(
    "flags, variance",
    [([], "learned"), (["--sampler=ddim"], "fixed_small"), (["--variance=fixed_large"], "fixed_large")],
)
def test_the_variance_is_that_of_the_config_or_of_the_flag(flags, variance):
    changes = {"diffusion.variance": "learned", "sampling.sampler": "ddpm", "sampling.variance": "learned"}
    model, _ = random_runs.random_model(tuple(changes.items()))
    values = sample.define_flags()
    command_line.parse(values, ["sample", *flags])
    assert from_flags.recipe_from_flags(model, values, []).solving.variance == variance


WRONG = {  # a field of a recipe -> a value of another type
    "num": "8", "seed": None, "labels": 3, "prompts": [1], "size": ["8", 8], "vae_tiling": "yes",
    "solving.steps": 2.5, "solving.spacing": [1, "2"], "solving.eta": float("nan"), "guidance.scale": True,
    "guidance.interval": "0,1", "edit.invert": 1, "edit.to_seed": "3", "concat.noise_level": 1.5, "solving": [],
    "edit": "mask",
}  # fmt: skip
OUT_OF_RANGE = {  # a field of a recipe -> numbers that it cannot have
    "num": 0, "seed": -1, "labels": [-1], "size": [3], "solving.steps": 0, "guidance.interval": [0.0],
    "guidance.scale": -1.0, "guidance.negative_label": -1, "edit.to_seed": 2**32, "edit.resample": 0,
    "concat.noise_level": -1, "refiner_start": 1.5,
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [*WRONG.items(), *OUT_OF_RANGE.items()])
def test_recipes_with_wrong_types_or_numbers_are_refused(field, value):
    recipe = to_json(RECIPE)
    assert to_json(from_json(recipe, "it")) == recipe
    section, _, name = field.rpartition(".")
    (recipe[section] if section else recipe)[name] = value
    with pytest.raises(InputError, match=rf"it has a damaged recipe: its {name} is "):
        from_json(recipe, "it")
