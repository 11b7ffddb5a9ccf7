"""CFG++ from the command line: its recipe, its defaults, and what it does not go with."""

import jobs
import numpy as np
import pytest
import random_runs

from ldm_jax import command_line, sample
from ldm_jax.errors import InputError
from ldm_jax.pipeline.load import load
from ldm_jax.sampling.image_grids import read_recipe
from ldm_jax.sampling.recipe import Guidance, default_recipe, with_guidance

FLOW = {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "flow"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    random_runs.random_run(folder / "classes")
    random_runs.random_run(folder / "unconditional", class_names=())
    random_runs.random_run(folder / "mean_flow", FLOW | {"diffusion.objective": "mean_flow"})
    return folder


def run(model, out, *flags):
    command = ["sample", f"--model={model}", f"--out={out}", "--steps=4", "--num=4", "--nosave_trajectory", *flags]
    return command_line.run(sample.main, command)


def sampled(model, out, *flags):
    assert run(model, out, *flags) == 0
    return jobs.samples(out)["images"].astype(int)


def test_the_recipe_and_its_default(runs, tmp_path):
    plain = sampled(runs / "classes", tmp_path / "plain", "--guidance=0.6")
    default, given = (
        sampled(runs / "classes", tmp_path / name, "--cfgpp", *more)
        for name, more in {"default": (), "given": ("--guidance=0.6",)}.items()
    )
    np.testing.assert_array_equal(default, given)
    assert (plain != given).any()
    guidance = read_recipe(tmp_path / "default" / "samples.png")["guidance"]
    assert (guidance["cfgpp"], guidance["scale"]) == (True, 0.6)
    assert read_recipe(tmp_path / "plain" / "samples.png")["guidance"]["cfgpp"] is False
    again = ["sample", f"--model={runs}/classes", f"--out={tmp_path}/c", f"--from_recipe={tmp_path}/given/samples.png"]
    assert command_line.run(sample.main, again) == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "c")["images"], given)
    unconditional = sampled(runs / "classes", tmp_path / "null", "--guidance=0")
    assert np.abs(sampled(runs / "classes", tmp_path / "zero", "--cfgpp", "--guidance=0") - unconditional).max() <= 1


@pytest.fixture(scope="module")
def plain(runs, tmp_path_factory):
    """Samples of CFG++ by ddim, without another option."""
    return sampled(runs / "classes", tmp_path_factory.mktemp("plain") / "out", "--cfgpp", "--label=0,2")


@pytest.mark.parametrize("flags", [["--sampler=euler_a"], ["--eta=0.5"], ["--negative_label=1"],
                                   ["--guidance_interval=0.2,0.7"]])  # fmt: skip
def test_what_it_goes_with(flags, runs, plain, tmp_path):
    """Each option acts, and CFG++ with it."""
    flags = ["--label=0,2", *flags]
    one = sampled(runs / "classes", tmp_path / "one", "--cfgpp", *flags)
    other = sampled(runs / "classes", tmp_path / "other", "--guidance=0.6", *flags)
    assert (one != other).any()
    assert (one != plain).any()


def test_by_euler_it_is_that_of_ddim(runs, plain, tmp_path):
    """Without noise both are one method."""
    euler = sampled(runs / "classes", tmp_path / "out", "--cfgpp", "--label=0,2", "--sampler=euler")
    np.testing.assert_allclose(euler, plain, atol=1)
    assert read_recipe(tmp_path / "out" / "samples.png")["solving"]["sampler"] == "euler"


REFUSED = {  # flags, RUNS for the folder of runs -> what the line must say
    "another sampler": (["--sampler=unipc"], "is not defined for --sampler=unipc; it must be one of ddim, euler"),
    "two calls a step": (["--sampler=heun"], "--cfgpp is not defined for --sampler=heun"),
    "a scale of guidance": (["--guidance=2"], "--guidance=2 is lambda with --cfgpp; it must be from 0 to 1, e.g. 0.6"),
    "rescaling": (["--guidance_rescale=0.7"], "--cfgpp and --guidance_rescale do not go together"),
    "projection": (["--guidance_parallel=0"], "--cfgpp and --guidance_parallel do not go together"),
    "its limit": (["--guidance_max_norm=15"], "--cfgpp and --guidance_max_norm do not go together"),
    "autoguidance": (["--guide_model=RUNS/classes"], "--cfgpp and --guide_model do not go together"),
    "a classifier": (["--classifier=RUNS/classes"], "--cfgpp and --classifier do not go together"),
    "CLIP": (["--clip=RUNS/classes", "--prompt=a"], "--cfgpp and --clip do not go together"),
    "no boolean": (["--cfgpp=maybe"], "cfgpp"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, runs, tmp_path, capsys):
    flags, expected = REFUSED[case]
    flags = [flag.replace("RUNS", str(runs)) for flag in flags]
    assert run(runs / "classes", tmp_path / "out", "--cfgpp", *flags) == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--invert"], ["--to_image=IMAGE"]])
def test_inversion_is_refused(flags, runs, tmp_path, capsys):
    sampled(runs / "classes", tmp_path / "a", "--save_each")
    image = next((tmp_path / "a" / "images").glob("*.png"))
    flags = [f"--init_image={image}", *(flag.replace("IMAGE", str(image)) for flag in flags)]
    assert run(runs / "classes", tmp_path / "out", "--cfgpp", "--sampler=ddim", *flags) == 2
    assert "do not go together; leave one of them out" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("model", "expected"),
    [("unconditional", "--cfgpp needs a model with classes or texts"), ("mean_flow", "is not defined for a MeanFlow")],
)
def test_models_without_it(model, expected, runs, tmp_path, capsys):
    assert run(runs / model, tmp_path / "out", "--cfgpp") == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_model_whose_input_is_the_guidance_scale(runs):
    from dataclasses import replace

    model, _ = load(runs / "classes")
    recipe = default_recipe(model, 4, 0, [0], [])
    recipe = recipe._replace(guidance=Guidance(0.6, [0.0, 1.0], cfgpp=True))
    assert with_guidance(model, recipe) == recipe
    distilled = replace(model, denoiser=model.denoiser.clone(time_cond_proj_dim=8))
    with pytest.raises(InputError, match="the guidance option cfgpp is for classifier-free guidance"):
        with_guidance(distilled, recipe)


def test_inpainting_keeps_the_known_region(runs, tmp_path):
    """With RePaint, whose repeated steps are rows of the table too."""
    from PIL import Image

    sampled(runs / "classes", tmp_path / "a", "--save_each", "--num=1")
    image = next((tmp_path / "a" / "images").glob("*.png"))
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = [f"--init_image={image}", f"--mask={tmp_path / 'mask.png'}", "--resample=2", "--sampler=ddim", "--cfgpp"]
    filled, original = sampled(runs / "classes", tmp_path / "b", *flags), np.asarray(Image.open(image)).astype(int)
    np.testing.assert_array_equal(filled[0, :, :4, 0], original[:, :4])
