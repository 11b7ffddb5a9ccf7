"""Our DiT against diffusers' DiTTransformer2DModel with the same weights, and whole DiTPipelines, read and written."""

import json
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
from parity.quiet import open_quietly

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `import random_runs`

import random_runs
import tiny

from ldm_jax import command_line, convert, sample
from ldm_jax.interop.dit import load_dit, state_dict_from_dit
from ldm_jax.interop.modules import abstract_params, dit_from_config
from ldm_jax.models.dit import DiT

BASE = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 8,
    "num_embeds_ada_norm": 1000,
}
QUICK = {"xla_backend_optimization_level": 0}  # compiles in two thirds of the time
CASES = {  # what differs from BASE; size of the latents
    "patches of two": ({}, 8),
    "patches of four, one variance": ({"patch_size": 4, "out_channels": None}, 8),
    "another size than in training": ({"patch_size": 1, "sample_size": 4, "num_embeds_ada_norm": 10}, 6),
}
EMBEDDINGS = "norm1.emb."


def random_dit(random_weights, shared, **changes):
    """diffusers' network with random weights, of all blocks the same embeddings if `shared`, as in released weights."""
    network = random_weights(diffusers.DiTTransformer2DModel(**BASE | changes))
    if shared:
        first = network.transformer_blocks[0].norm1.emb.state_dict()
        for block in network.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return network


@pytest.mark.parametrize("shared", [True, False], ids=["one embedding", "an embedding for each block"])
@pytest.mark.parametrize("name", CASES)
def test_forward(name, shared, random_weights, tmp_path):
    changes, size = CASES[name]
    network = random_dit(random_weights, shared, **changes)
    network.save_pretrained(tmp_path)
    dit, params, table = load_dit(tmp_path)
    assert dit.separate_embeddings == (not shared)
    rng = np.random.default_rng(0)
    z_t, t = rng.normal(size=(2, size, size, 4)).astype(np.float32), np.array([3, 871], np.int32)
    labels = np.array([7, BASE["num_embeds_ada_norm"]]) % len(table)
    predict = jax.jit(lambda *a: dit.apply({"params": params}, *a), compiler_options=QUICK)
    got = predict(z_t, t, table[labels])
    expected = network(
        torch.from_numpy(z_t.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t), torch.from_numpy(labels)
    )
    expected = expected.sample.numpy().transpose(0, 2, 3, 1)
    off = np.abs(got - expected).max() / np.abs(expected).max()
    print(f"off by {off:.1e} of the largest value")
    assert off < 1e-5 and expected.std() > 0.1


def test_the_weights_of_xl_2_have_their_names_and_shapes():
    with torch.device("meta"):
        network = diffusers.DiTTransformer2DModel(out_channels=8)
    dit, num_classes = dit_from_config({"_class_name": "DiTTransformer2DModel", **network.config})
    assert dit == DiT() and num_classes == 1000
    zeros = lambda leaf: np.broadcast_to(np.float32(0), leaf.shape)  # noqa: E731
    state = state_dict_from_dit(dit, jax.tree.map(zeros, abstract_params(dit)), np.zeros((1001, 1, 1152), np.float32))
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    assert {name: value.shape for name, value in state.items()} == shapes


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.18215,
    )


LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler(**LINEAR, clip_sample=False),  # of facebook/DiT-XL-2-256
    "DPM-Solver": diffusers.DPMSolverMultistepScheduler(**LINEAR),
}


@pytest.fixture
def same_start(monkeypatch):
    """A function (z_T [B, h, w, c]) that gives DiTPipeline this noise."""

    def patch(z_T):
        noise = torch.from_numpy(z_T.transpose(0, 3, 1, 2).copy())
        where = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
        monkeypatch.setattr(where, lambda *_, **__: noise)

    return patch


def sampled(folder, noise, out, *flags):
    """The images and labels of our command."""
    np.save(out.parent / "noise.npy", noise)
    command = ["sample", f"--model={folder}", f"--out={out}", f"--init_latents={out.parent / 'noise.npy'}"]
    assert command_line.run(sample.main, [*command, f"--num={len(noise)}", "--nosave_trajectory", *flags]) == 0
    with np.load(out / "samples.npz") as samples:
        return samples["images"].astype(float), samples["labels"].tolist()


def assert_same(got, expected):
    """Within one step of 255, and nearly everywhere equal, as images hardly differ if only the spacing is wrong."""
    assert got.shape == expected.shape and expected.std() > 10 and ((expected > 0) & (expected < 255)).mean() > 0.5
    off = np.abs(got - expected)
    print(f"off by at most {off.max():.0f} of 255, at {(off > 0).mean():.1e} of the values")
    assert off.max() <= 1 and (off > 0).mean() < 0.005


@pytest.mark.parametrize(("scheduler", "guidance"), [("DDIM", 4.0), ("DPM-Solver", 1.0)])
def test_a_pipeline(scheduler, guidance, random_weights, same_start, tmp_path):
    """As diffusers saves it, with the names of classes that are in released folders; then as `convert` writes it."""
    autoencoder = random_weights(vae())
    for p in autoencoder.decoder.conv_out.parameters():
        p *= 0.3  # so that images are not black and white
    pipe = diffusers.DiTPipeline(random_dit(random_weights, shared=True), autoencoder, SCHEDULERS[scheduler])
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    names = {str(k): f"class {k}, also {k}th" for k in range(1000)}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    pipe.set_progress_bar_config(disable=True)

    z_T = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    same_start(z_T)
    expected = (pipe([7, 981], guidance, num_inference_steps=20, output_type="np").images * 255).round()
    flags = ["--steps=20", f"--guidance={guidance}", "--label=class 7, also 7th,981"]
    got, labels = sampled(tmp_path / "model", z_T, tmp_path / "out", *flags)
    assert labels == [7, 981]
    assert_same(got, expected)

    assert command_line.run(convert.main, ["convert", f"--model={tmp_path}/model", f"--to={tmp_path}/again"]) == 0
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert again.labels["also 7th"] == 7
    images = (again([7, 981], guidance, num_inference_steps=20, output_type="np").images * 255).round()
    np.testing.assert_array_equal(images, expected)


RUNS = {  # changes of tests/tiny.py; class of the scheduler
    "eps, learned variance": ({"diffusion.variance": "learned", "sampling.spacing": "leading"}, "DDIMScheduler"),
    "v, DPM-Solver++": ({"diffusion.prediction": "v", "sampling.sampler": "dpmpp_2m"}, "DPMSolverMultistepScheduler"),
    "z0 by DDIM": ({"diffusion.prediction": "z0"}, "DDIMScheduler"),
}
DIT = {"denoiser": "dit", "dit.patch_size": 2, "dit.hidden_size": 16, "dit.depth": 2, "dit.heads": 2}


@pytest.mark.parametrize("kind", RUNS)
def test_diffusers_samples_the_images_of_a_run(kind, same_start, tmp_path):
    """Of four classes: with guidance, which takes DiTPipeline's class 1000."""
    changes, scheduler = RUNS[kind]
    common = {"diffusion.timesteps": 1000, "sampling.steps": 20, "sampling.guidance": 3.0}
    made = random_runs.random_run(tmp_path / "run", DIT | common | changes, contrast=0.4)
    assert command_line.run(convert.main, ["convert", f"--model={made}", f"--to={tmp_path}/folder"]) == 0
    open_quietly("DiTTransformer2DModel", tmp_path / "folder" / "transformer")
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "folder")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__name__ == scheduler
    assert pipe.labels == {name: k for k, name in sorted(enumerate(tiny.CLASS_NAMES), key=lambda pair: pair[1])}

    z_T = np.random.default_rng(0).standard_normal((4, 4, 4, 2)).astype(np.float32)
    same_start(z_T)
    expected = (pipe([0, 1, 2, 3], 3.0, num_inference_steps=20, output_type="np").images * 255).round()
    for model in (made, tmp_path / "folder"):
        got, labels = sampled(model, z_T, tmp_path / "out", "--steps=20", "--guidance=3")
        assert labels == [0, 1, 2, 3]
        assert_same(got, expected)
