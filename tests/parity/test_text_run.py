"""A run conditioned on texts by its own CLIP, converted to a small Stable Diffusion: diffusers samples the same."""

import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from parity.quiet import without_warnings

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `import tiny`

import jobs
import tiny

from ldm_jax import command_line, convert, sample

TEXTS = (
    "--config.stages=('autoencoder','clip','diffusion')",
    "--config.data.caption_key=auto",
    "--config.diffusion.timesteps=1000",
    "--config.diffusion.schedule=cosine",
    "--config.diffusion.prediction=v",
    "--config.sampling.num=0",
    "--config.diffusion.steps=40",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("text") / "run"
    tiny.prepare(data)
    assert jobs.train_here(data, folder, *TEXTS) == 0
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
    theirs = pipe(
        ["dark", "a bright picture"],
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=10,
        guidance_scale=3.0,
        output_type="np",
    ).images
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        ours = samples["images"].astype(int)
    assert np.abs(ours - np.round(theirs * 255).astype(int)).max() <= 1
