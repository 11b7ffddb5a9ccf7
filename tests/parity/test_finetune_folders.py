"""Whole small jobs of fine-tuning whose results diffusers opens as the pipelines that they began as."""

import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
from parity.quiet import without_warnings

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `import finetuning`

import diffusers_folder
from finetuning import fine_tune, write_pictures

from ldm_jax import command_line, convert
from ldm_jax.data.image_folder import prepare
from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.interop.lora import FILE
from ldm_jax.pipeline.load import load

KINDS = {
    "inpainting": "StableDiffusionInpaintPipeline",
    "upscaling": "StableDiffusionUpscalePipeline",
    "unconditional": "LDMPipeline",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_pictures(home / "pictures")
    prepare(home / "pictures", "plain", home / "data")
    for kind in ("inpainting", "upscaling"):
        diffusers_folder.write_stable_diffusion(home / kind, **{kind: True})
    diffusers_folder.write_unconditional(home / "unconditional")
    return home


def trained_by(home, kind, name, *changes):
    """The run folder of a job that samples as well."""
    data = ["--config.data.name=plain", "--config.data.caption_key=none"] if kind == "unconditional" else []
    flags = [f"--config.init_from={home / kind}", "--config.sampling.prompts=()", *data, *changes]
    assert fine_tune(home, name, *flags) == 0
    with np.load(home / name / "samples.npz") as samples:
        assert samples["images"].shape == (2, 16, 16, 3)
    return home / name


def opened(model, folder, kind):
    """diffusers' pipeline of what `convert` makes of a model."""
    assert command_line.run(convert.main, ["convert", f"--model={model}", f"--to={folder}"]) == 0
    with without_warnings():
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert type(pipe).__name__ == KINDS[kind]
    return pipe


def unet_of(model):
    _, params = load(model)
    return state_dict_from_params(params["denoiser"])


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_opens_what_has_been_fine_tuned(kind, home, tmp_path):
    run = trained_by(home, kind, f"{kind}_run")
    pipe, expected = opened(run, tmp_path / "folder", kind), unet_of(run)
    state = {name: p.numpy() for name, p in pipe.unet.state_dict().items()}
    assert state.keys() == expected.keys()
    assert all(np.array_equal(state[name], expected[name]) for name in state)
    before = unet_of(home / kind)
    assert max(np.abs(state[name] - before[name]).max() for name in state) > 1e-3


@pytest.mark.parametrize("kind", ["inpainting", "upscaling"])
def test_diffusers_adds_the_lora_that_has_been_trained(kind, home, tmp_path):
    run = trained_by(home, kind, f"{kind}_lora", "--config.lora.rank=2", "--config.lora.alpha=3.0")
    pipe, expected = opened(home / kind, tmp_path / "folder", kind), unet_of(run)
    before = {name: p.numpy().copy() for name, p in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(run, weight_name=FILE)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    state = {name: p.numpy() for name, p in pipe.unet.state_dict().items()}
    assert max(np.abs(state[name] - expected[name]).max() for name in expected) < 1e-6
    assert max(np.abs(state[name] - before[name]).max() for name in expected) > 1e-5
