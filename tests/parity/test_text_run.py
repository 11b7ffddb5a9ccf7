"""A run conditioned on texts by its own CLIP, converted to a small Stable Diffusion: diffusers samples the same."""

import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from parity.quiet import without_warnings

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `import tiny`

import diffusers_folder
import jobs
import tiny

from ldm_jax import command_line, convert, sample
from ldm_jax.pipeline.load import load
from ldm_jax.run_folder.checkpoint import Checkpoints, identity

TEXTS = (
    "--config.stages=('autoencoder','clip','diffusion')",
    "--config.data.caption_key=auto",
    "--config.diffusion.timesteps=1000",
    "--config.diffusion.schedule=cosine",
    "--config.diffusion.prediction=v",
    "--config.sampling.num=0",
    "--config.diffusion.steps=1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("text") / "run"
    tiny.prepare(data)
    assert jobs.train_here(data, folder, *TEXTS) == 0
    # A UNet at random in place of one so little trained that its prompts hardly matter.
    model, params = load(folder)
    ema_params = {"denoiser": diffusers_folder.random_params(params["denoiser"], 0)}
    with Checkpoints(folder / "diffusion", keep=2, identity=identity(model.origin.config, "diffusion")) as checkpoints:
        checkpoints.save({"step": np.int32(model.origin.step + 1), "ema_params": ema_params})
    return folder


@pytest.mark.parametrize("sampler", ["ddim", "unipc", "dpmpp_2m", "euler"])
def test_diffusers_samples_the_same(run, tmp_path, sampler):
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 2)).astype(np.float32)
    np.save(tmp_path / "noise.npy", latents)
    command = ["sample", f"--model={run}", f"--out={tmp_path / 'out'}", "--prompt=dark", "--prompt=a bright picture"]
    command += [f"--init_latents={tmp_path / 'noise.npy'}", f"--sampler={sampler}", "--steps=10", "--guidance=3"]
    assert command_line.run(sample.main, command) == 0
    changed = tmp_path / "folder"
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={changed}"]) == 0
    with without_warnings():
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(changed)
    pipe.scheduler = {
        "ddim": pipe.scheduler.__class__,
        "unipc": diffusers.UniPCMultistepScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
    }[sampler].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def images(prompts, guidance):
        noise = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
        options = {"num_inference_steps": 10, "guidance_scale": guidance, "output_type": "np"}
        return np.round(255 * pipe(prompts, latents=noise, **options).images).astype(int)

    expected = images(["dark", "a bright picture"], 3.0)
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        assert np.abs(samples["images"].astype(int) - expected).max() <= 1
    # Which says nothing unless few pixels are black or white, and prompts and guidance matter.
    assert ((expected > 0) & (expected < 255)).mean() > 0.5
    for others in (images(["a bright picture", "dark"], 3.0), images(["dark", "a bright picture"], 1.0)):
        assert np.abs(others - expected).max((1, 2, 3)).min() > 1
