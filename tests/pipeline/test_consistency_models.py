"""Latent consistency models, whose denoiser has the guidance scale as an input."""

import diffusers_folder
import finetuning
import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest

import ldm_jax
from ldm_jax import command_line, convert, sample
from ldm_jax.errors import InputError
from ldm_jax.models.unet import guidance_embedding
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import apply_denoiser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return diffusers_folder.write_stable_diffusion(tmp_path_factory.mktemp("lcm") / "model", lcm=True)


def run(folder, out, *flags):
    return command_line.run(sample.main, ["sample", f"--model={folder}", f"--out={out}", "--prompt=low", *flags])


def test_the_embedding_of_a_guidance_scale():
    """Luo 2023: sine, then cosine of 1000 omega over powers of 10000."""
    embedded = guidance_embedding(jnp.array([1.0, 1.5]), 4)
    np.testing.assert_allclose(embedded[0], [0, 0, 1, 1])
    np.testing.assert_allclose(embedded[1], [np.sin(500), np.sin(0.05), np.cos(500), np.cos(0.05)], atol=1e-4)


@pytest.mark.slow
def test_the_scale_is_an_input_and_by_default_none(folder, tmp_path):
    model, params = load(folder)
    assert (model.guidance_dim, model.defaults.sampler, model.defaults.steps, model.defaults.guidance) == (
        6,
        "lcm",
        4,
        8.5,
    )
    z, t = jax.random.normal(jax.random.key(0), (2, *model.latent_shape)), jnp.array([999, 500])
    cond = {"context": jnp.ones((2, 8, diffusers_folder.WIDTH))}
    outputs = [apply_denoiser(model, params, z, t, cond | more) for more in
               ({}, {"guidance": jnp.ones(2)}, {"guidance": jnp.array([1.0, 4.0])})]  # fmt: skip
    np.testing.assert_array_equal(outputs[0], outputs[1])
    same = np.isclose(outputs[0], outputs[2], atol=1e-6).all((1, 2, 3))
    assert same.tolist() == [True, False]
    images = []
    for scale in (1, 8.5):
        assert run(folder, tmp_path / "out", f"--guidance={scale}") == 0
        images.append(jobs.samples(tmp_path / "out")["images"])
    assert (images[0] != images[1]).any()
    assert run(folder, tmp_path / "default") == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path / "default")["images"], images[1])


@pytest.mark.parametrize("flag", ["--negative_prompt=wool", "--guidance_rescale=0.5", "--guidance_interval=0.1,1"])
def test_options_of_classifier_free_guidance_are_refused(flag, folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", flag) == 2
    assert "is for classifier-free guidance; the guidance scale is an input of this model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_supported_is_refused(folder, tmp_path, capsys):
    with pytest.raises(InputError, match="negative_prompt is for classifier-free guidance"):
        ldm_jax.sample(*load(folder), prompts="low", negative_prompt="wool")
    assert command_line.run(convert.main, ["convert", f"--model={folder}", f"--to={tmp_path}/m.safetensors"]) == 2
    assert "single files of latent consistency models are not written" in capsys.readouterr().err
    (tmp_path / "model").symlink_to(folder)
    finetuning.write_pictures(tmp_path / "pictures")
    assert finetuning.fine_tune(tmp_path, "run") == 2
    assert "is a latent consistency model, distilled from another" in capsys.readouterr().err
