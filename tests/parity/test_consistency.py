"""Latent consistency models and LCM-LoRA: the images of diffusers within 1 of 255."""

import json
import sys
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))  # for `import test_pipelines`
sys.path.insert(0, str(Path(__file__).parent.parent))  # for `import finetuning`

from finetuning import fine_tune, write_pictures
from test_lora import UNET_LAYERS, kohya_file, pairs_of
from test_pipelines import (  # noqa: F401
    BETAS,
    PROMPTS,
    UNET,
    assert_same,
    build,
    image_and_mask,
    noise,
    sampled,
    saved,
    text_encoder,
    tokenizer,
    vae,
)

from ldm_jax import command_line, convert
from ldm_jax.diffusion.random import fold, normal, sample_keys

SETTINGS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture
def our_noise(monkeypatch, noise):  # noqa: F811
    """our_noise(): diffusers' LCMScheduler takes the noise of our rows, from the first row on."""
    keys = sample_keys(0, jnp.arange(len(noise)))

    def patch():
        rows = iter(range(100))

        def row(*_, **__):
            values = jax.device_get(normal(fold(keys, next(rows)), noise.shape[1:]))
            return torch.from_numpy(values.transpose(0, 3, 1, 2).copy())

        monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", row)

    return patch


@pytest.fixture
def consistency_model(tokenizer, saved):  # noqa: F811
    """A LatentConsistencyModelPipeline, whose UNet has the guidance scale as an input, and its folder."""
    parts = {
        "unet": diffusers.UNet2DConditionModel(**UNET, time_cond_proj_dim=24),
        "vae": vae(0.18215),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer("one", "<|endoftext|>"),
        "scheduler": diffusers.LCMScheduler(**BETAS),
    }
    pipe, folder = saved(diffusers.LatentConsistencyModelPipeline, parts | SETTINGS)
    pipe.unet.time_embedding.cond_proj.weight.mul_(20)  # so that the scale matters
    pipe.unet.save_pretrained(folder / "unet")
    return pipe, folder


def expected_images(pipe, noise, steps, **arguments):  # noqa: F811
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    images = pipe(PROMPTS, num_inference_steps=steps, latents=latents, output_type="np", **arguments).images
    return (images * 255).round()


def test_a_latent_consistency_model(consistency_model, our_noise, sampled, noise):  # noqa: F811
    """At the pipeline's guidance, 8.5, and another; in one step and in four."""
    pipe, folder = consistency_model
    images = []
    for steps, flags, arguments in ((4, [], {}), (4, ["--guidance=3"], {"guidance_scale": 3.0}), (1, [], {})):
        our_noise()
        images.append(expected_images(pipe, noise, steps, **arguments))
        assert_same(sampled(folder, f"--steps={steps}", *flags), images[-1])
    assert np.abs(images[0] - images[1]).mean() > 1


@pytest.mark.parametrize("strength, steps", [(0.6, 4), (0.3, 2), (1.0, 4)])
def test_image_to_image(strength, steps, consistency_model, our_noise, sampled, noise, image_and_mask, tmp_path):  # noqa: F811
    """All steps are run whatever the strength, which shortens the timesteps of the distillation."""
    pipe, folder = consistency_model
    pipe = diffusers.LatentConsistencyModelImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    pipe.prepare_latents = lambda image, timestep, *_: pipe.scheduler.add_noise(
        pipe.vae.encode(image).latent_dist.mode() * pipe.vae.config.scaling_factor, latents, timestep
    )
    our_noise()
    arguments = {"image": image_and_mask[0], "strength": strength, "num_inference_steps": steps, "output_type": "np"}
    expected = (pipe(PROMPTS, **arguments).images * 255).round()
    flags = [f"--init_image={tmp_path}/image.png", f"--strength={strength}", f"--steps={steps}"]
    assert_same(sampled(folder, *flags), expected)


def test_what_convert_writes_opens_in_diffusers(consistency_model, tmp_path):
    pipe, folder = consistency_model
    assert command_line.run(convert.main, ["convert", f"--model={folder}", f"--to={tmp_path / 'again'}"]) == 0
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert isinstance(again, diffusers.LatentConsistencyModelPipeline)
    assert again.unet.config.time_cond_proj_dim == 24 and isinstance(again.scheduler, diffusers.LCMScheduler)
    ours, same = (each.unet.state_dict() for each in (again, pipe))
    assert ours.keys() == same.keys()
    for key, value in same.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("name", ["SD1", "SDXL"])
def test_lcm_lora(name, guidance, build, our_noise, sampled, noise, tmp_path):  # noqa: F811
    """As its card has it: LoRA of the UNet in kohya's names with alpha, LCMScheduler.from_config, 4 steps."""
    pipe, folder = build(name)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    unet = pairs_of(pipe.unet, UNET_LAYERS, np.random.default_rng(0))
    save_file(kohya_file(unet, []), tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    our_noise()
    expected = expected_images(pipe, noise, 4, guidance_scale=guidance)
    flags = ["--sampler=lcm", "--steps=4", f"--guidance={guidance}", f"--lora={tmp_path / 'lora.safetensors'}"]
    assert_same(sampled(folder, *flags), expected)
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"] != "LCMScheduler"


def test_a_distilled_run(build, our_noise, sampled, noise, tmp_path):  # noqa: F811
    """LCM-LoRA by configs/lcm.py: its export has LCMScheduler, and its file makes the base the same model."""
    pipe, _ = build("SD1")
    write_pictures(tmp_path / "pictures")
    height, width = (str(side * 2) for side in noise.shape[1:3])
    changes = ("--config=configs/lcm.py", "--config.lora.rank=2", "--config.diffusion.ema_decay=0.0")
    changes += ("--config.diffusion.learning_rate=0.1", "--config.sampling.num=0")
    assert fine_tune(tmp_path, "run", *changes) == 0
    run, folder = tmp_path / "run", tmp_path / "distilled"
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={folder}"]) == 0
    distilled = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert isinstance(distilled.scheduler, diffusers.LCMScheduler)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    our_noise()
    base = expected_images(pipe, noise, 4, guidance_scale=1.0)
    pipe.load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors")
    images = sampled(run, "--steps=4", f"--height={height}", f"--width={width}")
    for reference in (distilled, pipe):
        our_noise()
        assert_same(images, expected_images(reference, noise, 4, guidance_scale=1.0))
    assert np.abs(images - base).mean() > 1
