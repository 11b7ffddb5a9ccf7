"""Textual inversion files of every layout: the images of diffusers with the same file, within 1 of 255."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))  # for `import test_pipelines`

from test_pipelines import SIZE, build, saved, tokenizer  # noqa: F401

from ldm_jax import command_line, sample

PROMPTS = ["a red <cat-toy> sleeping", "two small dogs"]


def one_vector(path, vectors):
    save_file({"<cat-toy>": vectors[0]}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def several_vectors(path, vectors):
    torch.save({"<cat-toy>": torch.from_numpy(vectors)}, path.with_suffix(".bin"))
    return path.with_suffix(".bin")


def of_automatic1111(path, vectors):
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(torch.from_numpy(vectors))},
               "name": "<cat-toy>", "step": 100, "sd_checkpoint": None, "sd_checkpoint_name": None}  # fmt: skip
    torch.save(content, path.with_name("<cat-toy>.pt"))
    return path.with_name("<cat-toy>.pt")


@pytest.mark.parametrize("write", [one_vector, several_vectors, of_automatic1111])
@pytest.mark.parametrize("name", ["SD1", "SD2-v"])
def test_the_images_of_diffusers(name, write, build, tmp_path):  # noqa: F811
    pipe, folder = build(name)
    width = pipe.text_encoder.config.hidden_size
    path = write(tmp_path / "file", np.random.default_rng(0).standard_normal((3, width)).astype(np.float32))
    pipe.load_textual_inversion(str(path), token="<cat-toy>")
    check(pipe, folder, path, tmp_path)


def test_both_encoders_of_sdxl(build, tmp_path):  # noqa: F811
    pipe, folder = build("SDXL")
    rng, vectors = np.random.default_rng(0), {}
    for name, encoder in (("clip_l", pipe.text_encoder), ("clip_g", pipe.text_encoder_2)):
        vectors[name] = rng.standard_normal((2, encoder.config.hidden_size)).astype(np.float32)
    path = tmp_path / "<cat-toy>.safetensors"
    save_file(vectors, path)
    for name, encoder, its in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        pipe.load_textual_inversion(torch.from_numpy(vectors[name]), "<cat-toy>", its, encoder)
    check(pipe, folder, path, tmp_path)


def check(pipe, folder, path, tmp_path):
    z_T = np.random.default_rng(1).standard_normal((2, SIZE, SIZE, 4)).astype(np.float32)
    np.save(tmp_path / "z.npy", z_T)
    flags = [f"--prompt={prompt}" for prompt in PROMPTS] + ["--steps=4", "--num=2", f"--embedding={path}"]
    flags += [f"--init_latents={tmp_path / 'z.npy'}", f"--model={folder}", f"--out={tmp_path / 'out'}"]
    assert command_line.run(sample.main, ["sample", *flags]) == 0
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        sampled = arrays["images"].astype(int)
    latents = torch.from_numpy(z_T.transpose(0, 3, 1, 2).copy())
    reference = pipe(PROMPTS, num_inference_steps=4, latents=latents, output_type="np").images
    assert np.abs(sampled - (reference * 255).round().astype(int)).max() <= 1
