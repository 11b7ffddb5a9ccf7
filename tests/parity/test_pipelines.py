"""Whole pipelines: one folder, sampled by our command and by diffusers, from the same noise to the same images."""

import inspect
import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `import bpe`

from bpe import learn_merges, make_vocab, write_tokenizer

from ldm_jax import command_line, convert, sample
from ldm_jax.diffusion.random import low_resolution_noise, sample_keys
from ldm_jax.interop.pipelines import PIPELINE_CLASS, PIPELINES

PROMPTS = ["a red cat", "two small dogs, sleeping"]
NEGATIVE = "a blurry picture"
SIZE, LENGTH = 16, 16  # of the latents; of the texts
MERGES = learn_merges([*" ".join([*PROMPTS, NEGATIVE]).replace(",", " ,").split()] * 2, 40)
VOCAB = len(make_vocab(MERGES))

UNET = {
    "sample_size": SIZE,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "eos_token_id": 2,
    "bos_token_id": VOCAB - 2,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SD2 = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
SCHEDULERS = {
    "SD1": diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    "SD2-v": diffusers.DDIMScheduler(
        **BETAS, prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1, clip_sample=False
    ),
    "SDXL": diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
}
EDM = {  # scheduler, and scaling of the autoencoder's latents: Playground v2.5, CosXL, and each with the other spacing
    "playground": (
        diffusers.EDMDPMSolverMultistepScheduler(sigma_data=0.5),
        {"scaling_factor": 0.5, "latents_mean": [-1.6, 1.1, 0.4, 0.2], "latents_std": [1.4, 0.9, 1.2, 0.7]},
    ),
    "cosxl": (
        diffusers.EDMEulerScheduler(
            sigma_data=1.0, sigma_max=120.0, sigma_schedule="exponential", prediction_type="v_prediction"
        ),
        {},
    ),
    "DPM-Solver, exponential": (
        diffusers.EDMDPMSolverMultistepScheduler(
            sigma_data=1.0, sigma_max=120.0, sigma_schedule="exponential", prediction_type="v_prediction"
        ),
        {},
    ),
    "Euler, karras": (diffusers.EDMEulerScheduler(), {"scaling_factor": 0.3}),
}
OTHERS = {
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,  # whose noise begins scaled
    "lms": diffusers.LMSDiscreteScheduler,
    "deis": diffusers.DEISMultistepScheduler,
}


def vae(factor, levels=2, **scaling):
    """An autoencoder that halves the size between its levels; `scaling` is of its latents."""
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=8,
        **{"scaling_factor": factor} | scaling,
    )


def text_encoder(**changes):
    kind = transformers.CLIPTextModelWithProjection if "projection_dim" in changes else transformers.CLIPTextModel
    return kind(transformers.CLIPTextConfig(**TEXT | changes))


@pytest.fixture
def tokenizer(tmp_path):
    """tokenizer(name of a folder, what it pads with) -> that of transformers."""

    def make(name, pad):
        write_tokenizer(tmp_path / name, MERGES, length=LENGTH, pad_token=pad)
        return transformers.CLIPTokenizer.from_pretrained(tmp_path / name)

    return make


@pytest.fixture
def saved(tmp_path, random_weights):
    """saved(pipeline class, parts) -> diffusers' pipeline, with random weights, and the folder that it was saved to."""

    def save(kind, parts):
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                random_weights(part)
        for p in parts["vae"].decoder.conv_out.parameters():
            p *= 0.3  # so that images are not black and white
        pipe = kind(**parts)
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(tmp_path / "model")
        # Read back: to `from_config` what a file states is stated, what it leaves out is another class's own default.
        pipe.scheduler = type(pipe.scheduler).from_pretrained(tmp_path / "model" / "scheduler")
        return pipe, tmp_path / "model"

    return save


@pytest.fixture
def build(tokenizer, saved):
    """build(name, in_channels, pipeline class, scheduler, scaling) -> the diffusers pipeline and its saved folder."""

    def make(name, in_channels=4, kind=None, scheduler=None, scaling=None):
        if name == "SDXL":
            parts = {
                "unet": diffusers.UNet2DConditionModel(
                    **UNET | SD2 | {"cross_attention_dim": 72},
                    in_channels=in_channels,
                    addition_embed_type="text_time",
                    addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=24 + 6 * 8,
                ),
                "vae": vae(0.13025, **scaling or {}),
                "text_encoder": text_encoder(),
                "text_encoder_2": text_encoder(hidden_size=40, hidden_act="gelu", projection_dim=24),
                "tokenizer": tokenizer("one", "<|endoftext|>"),
                "tokenizer_2": tokenizer("two", "!"),
            }
            kind = kind or diffusers.StableDiffusionXLPipeline
        else:
            changes = SD2 if name == "SD2-v" else {}
            act = {"hidden_act": "gelu"} if name == "SD2-v" else {}
            parts = {
                "unet": diffusers.UNet2DConditionModel(**UNET | changes, in_channels=in_channels),
                "vae": vae(0.18215),
                "text_encoder": text_encoder(**act),
                "tokenizer": tokenizer("one", "!" if name == "SD2-v" else "<|endoftext|>"),
                "safety_checker": None,
                "feature_extractor": None,
                "requires_safety_checker": False,
            }
            kind = kind or diffusers.StableDiffusionPipeline
        return saved(kind, parts | {"scheduler": scheduler or SCHEDULERS[name]})

    return make


@pytest.fixture
def noise(tmp_path):
    """The unit noise that both begin with, as --init_latents has it."""
    z_T = np.random.default_rng(0).standard_normal((2, SIZE, SIZE, 4)).astype(np.float32)
    np.save(tmp_path / "noise.npy", z_T)
    return z_T


@pytest.fixture
def sampled(tmp_path, noise):
    """sampled(folder, *flags) -> the images of our command, float [2, H, W, 3] of 255."""

    def run(folder, *flags):
        out = tmp_path / "out"
        command = ["sample", f"--model={folder}", f"--out={out}", "--steps=20", *map("--prompt={}".format, PROMPTS)]
        assert command_line.run(sample.main, [*command, f"--init_latents={tmp_path}/noise.npy", *flags]) == 0
        with np.load(out / "samples.npz") as samples:
            return samples["images"].astype(float)

    return run


def diffusers_images(pipe, noise, **arguments):
    """diffusers' images, uint8 values as float [2, H, W, 3]."""
    beginning = {} if "image" in arguments else {"latents": torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())}
    images = pipe(PROMPTS, num_inference_steps=20, output_type="np", **beginning, **arguments).images
    return (images * 255).round()


def assert_same(ours, expected):
    """Within one step of 255, and nearly everywhere equal, as images hardly differ if only the spacing is wrong."""
    assert expected.std() > 10
    assert ((expected > 0) & (expected < 255)).mean() > 0.5
    off = np.abs(ours - expected)
    print(f"off by at most {off.max():.0f} of 255, at {(off > 0).mean():.1e} of the values")
    assert off.max() <= 1
    assert (off > 0).mean() < 0.005


@pytest.mark.parametrize("name", sorted(PIPELINES.keys() - {PIPELINE_CLASS}))  # but ours
def test_defaults_are_theirs(name):
    arguments = inspect.signature(getattr(diffusers, name).__call__).parameters
    assert arguments["num_inference_steps"].default == PIPELINES[name].steps
    assert PIPELINES[name].guidance == (arguments["guidance_scale"].default if "guidance_scale" in arguments else 1.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_text_to_image(name, build, sampled, noise):
    pipe, folder = build(name)
    assert_same(
        sampled(folder, "--guidance=7.5", f"--negative_prompt={NEGATIVE}"),
        diffusers_images(pipe, noise, guidance_scale=7.5, negative_prompt=[NEGATIVE] * 2),
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_a_negative_prompt_and_with_the_defaults(name, build, sampled, noise):
    """SDXL's null condition is zeros; guidance is the pipeline's own."""
    pipe, folder = build(name)
    assert_same(sampled(folder), diffusers_images(pipe, noise))


@pytest.mark.parametrize("sampler", OTHERS)
def test_another_sampler(sampler, build, sampled, noise):
    pipe, folder = build("SD1")
    pipe.scheduler = OTHERS[sampler].from_config(pipe.scheduler.config)
    assert_same(sampled(folder, f"--sampler={sampler}"), diffusers_images(pipe, noise))


@pytest.mark.parametrize("sampler", [None, "euler"])
def test_scheduler_fields_that_the_pipeline_forces(sampler, build, sampled, noise):
    """Old files leave out steps_offset and clip_sample, which the pipeline sets, though not for another scheduler."""
    _, folder = build("SD2-v")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["steps_offset"], config["clip_sample"]
    path.write_text(json.dumps(config))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.scheduler.config.steps_offset, pipe.scheduler.config.clip_sample) == (1, False)
    if sampler:
        pipe.scheduler = OTHERS[sampler].from_config(pipe.scheduler.config)
        assert pipe.scheduler.config.steps_offset == 0
    assert_same(sampled(folder, *([f"--sampler={sampler}"] if sampler else [])), diffusers_images(pipe, noise))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_size(name, build, sampled, noise, tmp_path):
    """SDXL is conditioned on it."""
    pipe, folder = build(name)
    size = {"height": 3 * SIZE // 2, "width": 2 * SIZE}
    z_T = np.random.default_rng(2).standard_normal((2, 3 * SIZE // 4, SIZE, 4)).astype(np.float32)
    np.save(tmp_path / "noise.npy", z_T)
    expected = diffusers_images(pipe, z_T, **size)
    assert expected.shape == (2, *size.values(), 3)
    assert_same(sampled(folder, *(f"--{flag}={side}" for flag, side in size.items())), expected)


@pytest.fixture
def without_chance(monkeypatch, noise):
    """without_chance(module): their pipeline takes the noise that is ours, and the most likely latents of an image."""

    def patch(module):
        where = f"diffusers.pipelines.{module}"
        given = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
        monkeypatch.setattr(f"{where}.randn_tensor", lambda *_, **__: given)
        monkeypatch.setattr(f"{where}.retrieve_latents", lambda encoded, *_, **__: encoded.latent_dist.mode())

    return patch


@pytest.fixture
def image_and_mask(tmp_path):
    """An image, and a mask of its middle, as files."""
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8))
    image = small.resize((2 * SIZE, 2 * SIZE), Image.Resampling.BICUBIC)
    mask = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
    mask[8:24, 4:28] = 255
    image.save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return image, Image.fromarray(mask)


@pytest.mark.parametrize("name, sampler", [("SD2-v", None), ("SDXL", None), ("SD1", "euler")])
def test_image_to_image(name, sampler, build, sampled, noise, without_chance, image_and_mask, tmp_path):
    xl = name == "SDXL"
    kind = diffusers.StableDiffusionXLImg2ImgPipeline if xl else diffusers.StableDiffusionImg2ImgPipeline
    family = "stable_diffusion_xl" if xl else "stable_diffusion"
    without_chance(f"{family}.pipeline_{family}_img2img")
    pipe, folder = build(name, kind=kind)
    if sampler:
        pipe.scheduler = OTHERS[sampler].from_config(pipe.scheduler.config)
    expected = diffusers_images(pipe, noise, image=image_and_mask[0], strength=0.6)
    flags = [f"--sampler={sampler}"] if sampler else []
    assert_same(sampled(folder, f"--init_image={tmp_path}/image.png", "--strength=0.6", *flags), expected)


@pytest.mark.parametrize("model", EDM)
def test_edm_models(model, build, sampled, noise):
    scheduler, scaling = EDM[model]
    pipe, folder = build("SDXL", scheduler=scheduler, scaling=scaling)
    assert_same(
        sampled(folder, "--guidance=3", f"--negative_prompt={NEGATIVE}"),
        diffusers_images(pipe, noise, guidance_scale=3.0, negative_prompt=[NEGATIVE] * 2),
    )


@pytest.mark.parametrize("model", ["playground", "cosxl"])
def test_image_to_image_of_edm_models(model, build, sampled, noise, without_chance, image_and_mask, tmp_path):
    without_chance("stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img")
    scheduler, scaling = EDM[model]
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    pipe, folder = build("SDXL", kind=kind, scheduler=scheduler, scaling=scaling)
    expected = diffusers_images(pipe, noise, image=image_and_mask[0], strength=0.6)
    assert_same(sampled(folder, f"--init_image={tmp_path}/image.png", "--strength=0.6"), expected)


@pytest.mark.parametrize("model", EDM)
def test_converted_edm_models_in_diffusers(model, build, noise, tmp_path):
    """What `convert` writes has the images of the folder that it was made of."""
    scheduler, scaling = EDM[model]
    pipe, folder = build("SDXL", scheduler=scheduler, scaling=scaling)
    assert command_line.run(convert.main, ["convert", f"--model={folder}", f"--to={tmp_path / 'to'}"]) == 0
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "to")
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is type(scheduler)
    stated = {field: value for field, value in again.scheduler.config.items() if not field.startswith("_")}
    assert stated == {field: scheduler.config[field] for field in stated}
    assert_same(diffusers_images(again, noise), diffusers_images(pipe, noise))


def test_inpainting(build, sampled, noise, without_chance, image_and_mask, tmp_path):
    """Where the mask is white; the rest has gone through the autoencoder in diffusers, and is kept to the bit here."""
    without_chance("stable_diffusion.pipeline_stable_diffusion_inpaint")
    pipe, folder = build("SD1", in_channels=9, kind=diffusers.StableDiffusionInpaintPipeline)
    image, mask = image_and_mask
    size = {"height": 2 * SIZE, "width": 2 * SIZE}
    expected = diffusers_images(pipe, noise, image=image, mask_image=mask, strength=1.0, **size)
    ours = sampled(folder, f"--init_image={tmp_path}/image.png", f"--mask={tmp_path}/mask.png")
    white = np.asarray(mask) > 0
    assert_same(ours[:, white], expected[:, white])
    np.testing.assert_array_equal(ours[:, ~white], np.broadcast_to(np.asarray(image)[~white], ours[:, ~white].shape))


def test_upscaling(tokenizer, saved, sampled, noise, monkeypatch, tmp_path):
    """A low-resolution image, noised as ours is, to one of four times its size."""
    unet = UNET | SD2 | {"only_cross_attention": (True, False), "num_class_embeds": 400, "in_channels": 7}
    unet |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    unet |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    parts = {
        "unet": diffusers.UNet2DConditionModel(**unet),
        "vae": vae(0.08333, levels=3),
        "text_encoder": text_encoder(hidden_act="gelu"),
        "tokenizer": tokenizer("one", "!"),
        "scheduler": SCHEDULERS["SD2-v"],
        "low_res_scheduler": diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02),
    }
    pipe, folder = saved(diffusers.StableDiffusionUpscalePipeline, parts)
    small = np.random.default_rng(1).integers(0, 255, (16, 12, 3), np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    z_T = np.random.default_rng(2).standard_normal((2, 16, 12, 4)).astype(np.float32)
    np.save(tmp_path / "noise.npy", z_T)

    noise = np.array(low_resolution_noise(sample_keys(np.uint32(0), np.arange(2)), small.shape)).transpose(0, 3, 1, 2)
    where = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale.randn_tensor"
    monkeypatch.setattr(where, lambda *_, **__: torch.from_numpy(noise.copy()))
    latents = torch.from_numpy(z_T.transpose(0, 3, 1, 2).copy())
    for level in (20, 300):
        images = [Image.fromarray(small)] * 2
        expected = diffusers_images(pipe, noise, image=images, latents=latents, noise_level=level)
        assert expected.shape == (2, 64, 48, 3)
        assert_same(sampled(folder, f"--concat_image={tmp_path}/small.png", f"--noise_level={level}"), expected)
