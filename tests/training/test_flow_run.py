"""A job on rectified flow from its config: trained, validated, bounded, sampled by every solver, edited."""

import json
import re

import jobs
import numpy as np
import pytest
import random_runs
from PIL import Image

from ldm_jax import command_line, sample
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.errors import InputError
from ldm_jax.pipeline.load import load
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling.sampler import make_sampler

FLOW = {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "flow"}
FLAGS = [
    *(f"--config.{name}={value}" for name, value in FLOW.items()),
    "--config.diffusion.timestep_sampling=logit_normal",
    "--config.diffusion.weighting=min_snr",
    "--config.sampling.guidance=2.0",
    "--config.evaluation.vlb_examples=8",
]


@pytest.mark.slow
def test_a_whole_run(tiny_data, tmp_path):
    assert jobs.train_here(tiny_data, tmp_path / "run", *FLAGS) == 0
    losses = jobs.losses(tmp_path / "run")
    assert np.isfinite(list(losses.values())).all()
    images = jobs.samples(tmp_path / "run")["images"]
    assert images.shape == (8, 8, 8, 1) and images.std() > 1
    bits = json.loads((tmp_path / "run" / "bits_per_dim.json").read_text())
    assert np.isfinite(bits["total"]) and bits["prior"] == 0  # z_T is noise alone
    assert jobs.train_here(tiny_data, tmp_path / "run", *FLAGS) == 0  # all is done


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / "image.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    random_runs.random_run(folder / "run", FLOW)
    return folder


def sampled(run, *flags, guidance=2):
    command = ["sample", f"--model={run}/run", f"--out={run}/out", "--num=4", f"--guidance={guidance}", *flags]
    assert command_line.run(sample.main, ["sample", *command[1:]]) == 0
    return jobs.samples(run / "out")["images"].astype(int)


@pytest.mark.slow
def test_every_solver_samples_it(run):
    for sampler in SOLVERS:
        images = sampled(run, f"--sampler={sampler}", "--steps=6")
        assert images.std() > 1, sampler


def test_editing(run):
    image = np.asarray(Image.open(run / "image.png"))[..., None].astype(int)
    weak, strong = (sampled(run, f"--init_image={run}/image.png", f"--strength={s}", "--steps=20") for s in (0.05, 1))
    assert np.abs(weak - weak[0]).mean() < np.abs(strong - strong[0]).mean()
    filled = sampled(run, f"--init_image={run}/image.png", f"--mask={run}/mask.png", "--sampler=ddpm", "--steps=6",
                     "--resample=2")  # fmt: skip
    np.testing.assert_array_equal(filled[:, :, :4], np.broadcast_to(image[:, :4], filled[:, :, :4].shape))


def test_ddim_inversion_and_sampling_is_the_reconstruction(run):
    model, params = load(run / "run")
    sampler, params = make_sampler(model, 4), replicate(params)
    original = np.asarray(Image.open(run / "image.png"))[None, ..., None]
    reconstruction = sampler.decode(params, sampler.encode(params, original))[0].astype(int)
    flags = ("--steps=20", "--sampler=ddim")
    inverted = sampled(run, f"--init_image={run}/image.png", "--invert", *flags, guidance=1)
    of_noise = sampled(run, *flags, guidance=1)
    far, near = (np.abs(images - reconstruction).mean((1, 2, 3)) for images in (of_noise, inverted))
    assert near.max() < 4 and far.min() > 12  # of 255; the images are of four classes


def test_spacings_that_need_a_finite_noise_level_are_refused(run, capsys):
    command = ["sample", f"--model={run}/run", f"--out={run}/none", "--spacing=karras"]
    assert command_line.run(sample.main, command) == 2
    assert "karras spacing needs a schedule that ends above alpha = 0" in capsys.readouterr().err
    assert not (run / "none").exists()


@pytest.mark.parametrize("changes, problem", [
    ({"diffusion.prediction": "eps"}, "prediction 'eps' does not determine z0 at timestep 19"),
    ({"diffusion.prediction": "v"}, "predict z0 or flow"),
])  # fmt: skip
def test_predictions_that_do_not_determine_z0(changes, problem):
    with pytest.raises(InputError, match=re.escape(problem)):
        random_runs.random_config(FLOW | changes)
