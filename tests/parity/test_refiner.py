"""SDXL's refiner, alone and behind the base: the images of diffusers within 1 of 255."""

import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `import test_pipelines`

from test_pipelines import (  # noqa: F401
    NEGATIVE,
    PROMPTS,
    SCHEDULERS,
    UNET,
    assert_same,
    build,
    diffusers_images,
    image_and_mask,
    noise,
    sampled,
    saved,
    text_encoder,
    tokenizer,
    vae,
    without_chance,
)

from ldm_jax import command_line, convert
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import fingerprint

OTHERS = {"unipc": diffusers.UniPCMultistepScheduler, "dpmpp_2m": diffusers.DPMSolverMultistepScheduler}


@pytest.fixture
def refiner(tmp_path_factory, tokenizer, random_weights):  # noqa: F811
    """diffusers' pipeline of the published refiner's layout, and its folder: attention at the middle levels."""
    unet = UNET | {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 40,
    }
    parts = {
        "unet": diffusers.UNet2DConditionModel(
            **unet,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 5 * 8,
        ),
        "vae": vae(0.13025),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": text_encoder(hidden_size=40, hidden_act="gelu", projection_dim=24),
        "tokenizer_2": tokenizer("refiner", "!"),
        "scheduler": SCHEDULERS["SDXL"],
    }
    for name in ("unet", "vae", "text_encoder_2"):
        random_weights(parts[name])
    for p in parts["vae"].decoder.conv_out.parameters():
        p *= 0.3
    settings = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, **settings)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("refiner") / "model"
    pipe.save_pretrained(folder)
    pipe.scheduler = type(pipe.scheduler).from_pretrained(folder / "scheduler")
    return pipe, folder


@pytest.mark.parametrize("negative", [(), (NEGATIVE,)])
def test_image_to_image(negative, refiner, sampled, noise, without_chance, image_and_mask, tmp_path):  # noqa: F811
    """The aesthetic scores are 6 and 2.5; without a negative prompt the null condition is the empty text."""
    without_chance("stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img")
    pipe, folder = refiner
    arguments = {"negative_prompt": [NEGATIVE] * 2} if negative else {}
    expected = diffusers_images(pipe, noise, image=image_and_mask[0], strength=0.6, **arguments)
    flags = [f"--negative_prompt={text}" for text in negative]
    assert_same(sampled(folder, f"--init_image={tmp_path}/image.png", "--strength=0.6", *flags), expected)
    high = diffusers_images(
        pipe, noise, image=image_and_mask[0], strength=0.6, negative_aesthetic_score=6.0, **arguments
    )
    assert np.abs(high - expected).max() > 1


@pytest.mark.parametrize("sampler", [None, *OTHERS])
@pytest.mark.parametrize("start", [0.8, 0.5])
def test_behind_the_base(sampler, start, build, refiner, sampled, noise):  # noqa: F811
    """denoising_end of the base, denoising_start of the refiner."""
    (base, folder), (pipe, refiner_folder) = build("SDXL"), refiner
    if sampler:
        for each in (base, pipe):
            each.scheduler = OTHERS[sampler].from_config(each.scheduler.config)
    z_T = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    common = {"num_inference_steps": 20, "negative_prompt": [NEGATIVE] * 2}
    latents = base(PROMPTS, latents=z_T, denoising_end=start, output_type="latent", **common).images
    expected = pipe(PROMPTS, image=latents, denoising_start=start, output_type="np", **common).images
    expected = (expected * 255).round()
    flags = [f"--refiner={refiner_folder}", f"--refiner_start={start}", f"--negative_prompt={NEGATIVE}"]
    ours = sampled(folder, *flags, *([f"--sampler={sampler}"] if sampler else []))
    assert_same(ours, expected)


def test_what_convert_writes_opens_in_diffusers(refiner, tmp_path):
    pipe, folder = refiner
    assert command_line.run(convert.main, ["convert", f"--model={folder}", f"--to={tmp_path / 'again'}"]) == 0
    assert fingerprint(*load(folder)) == fingerprint(*load(tmp_path / "again"))
    again = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path / "again")
    assert again.text_encoder is None and again.tokenizer is None
    assert again.config.requires_aesthetics_score and not again.config.force_zeros_for_empty_prompt
    for name in ("unet", "vae", "text_encoder_2"):
        ours, same = (getattr(each, name).state_dict() for each in (again, pipe))
        assert ours.keys() == same.keys()
        for key, value in same.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=0, msg=f"{name} {key}")
