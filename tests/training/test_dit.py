"""A diffusion transformer by config: on paper, and through the whole job."""

import jax
import jobs
import numpy as np
import pytest
import random_runs
import tiny

from ldm_jax import command_line, convert, job, sample
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.models.dit import DiT
from ldm_jax.pipeline.from_run import on_paper
from ldm_jax.pipeline.load import load
from ldm_jax.run_folder.checkpoint import load_latest

DIT = {"denoiser": "dit", "dit.patch_size": 2, "dit.hidden_size": 8, "dit.depth": 2, "dit.heads": 2}
FLAGS = [f"--config.{name}={value}" for name, value in DIT.items()]


def test_the_fields_of_the_config_are_those_of_the_network(capsys):
    changes = {"dit.norm": "rms", "dit.qk_norm": "rms", "dit.mlp_ratio": 2.0, "diffusion.variance": "learned"}
    config = random_runs.random_config(DIT | changes | {"concat.type": "inpainting", "dtype": "bfloat16"})
    model, shapes = on_paper(config, tiny.CLASS_NAMES)
    assert model.denoiser == DiT(
        in_channels=2 + 3, out_channels=4, sample_size=4, patch_size=2, hidden_size=8, depth=2, heads=2,
        mlp_ratio=2.0, qk_norm="rms", norm="rms", dtype=np.dtype("bfloat16"),
    )  # fmt: skip
    assert model.learned_variance and model.latent_shape == (4, 4, 2)
    table = shapes["conditioning"]["embedding"]["embedding"]
    assert table.shape == (len(tiny.CLASS_NAMES) + 1, 8)
    initial = model.conditioning.init(jax.random.key(0))["embedding"]["embedding"]
    assert 0.01 < initial.std() < 0.03  # Peebles & Xie 2023
    job.print_sizes(config, model, shapes, num_classes=4)
    assert "denoiser" in capsys.readouterr().out


def test_a_text_is_cross_attended():
    changes = {"stages": ("autoencoder", "clip", "diffusion"), "data.caption_key": "auto", "clip.text_width": 12}
    changes |= {"clip.text_heads": 2, "sampling.sampler": "ddim"}
    model, shapes = on_paper(random_runs.random_config(DIT | changes), ())
    assert isinstance(model.conditioning, TextConditioning) and model.denoiser.cross_attention_dim == 12
    assert shapes["denoiser"]["transformer_blocks_1"]["attn2"]["to_k"]["kernel"].shape == (12, 8)


@pytest.fixture(scope="module")
def dit_run(tiny_data, tmp_path_factory):
    """The run folder of a small job with a DiT by FSDP, with gradient checkpointing and a learned variance."""
    run = tmp_path_factory.mktemp("dit") / "run"
    changes = ["--config.parallel.remat=True", "--config.diffusion.variance=learned", "--config.sampling.sampler=ddpm"]
    changes += ["--config.parallel.engine=fsdp", "--config.diffusion.optimizer=muon"]
    assert jobs.train_here(tiny_data, run, *FLAGS, *changes) == 0
    return run


@pytest.mark.slow
def test_the_whole_job(dit_run):
    state = load_latest(dit_run / "diffusion")
    assert all(np.isfinite(array).all() for array in state.values())
    assert state["params/unet/proj_out_2/kernel"].any() and state["params/unet/proj_out_1/kernel"].any()
    assert jobs.samples(dit_run)["images"].shape == (8, 8, 8, 1)
    assert (dit_run / "report.html").stat().st_size


@pytest.mark.slow
def test_a_trained_run_samples_again(dit_run, tmp_path):
    assert isinstance(load(dit_run)[0].denoiser, DiT)
    command = ["sample", f"--model={dit_run}", "--num=8", "--batch_size=8", f"--out={tmp_path}", "--nosave_trajectory"]
    assert command_line.run(sample.main, command) == 0
    np.testing.assert_array_equal(jobs.samples(tmp_path)["images"], jobs.samples(dit_run)["images"])


@pytest.mark.slow
def test_another_size_of_the_network_is_another_run(dit_run, tiny_data, capsys):
    assert jobs.train_here(tiny_data, dit_run, *FLAGS, "--config.dit.depth=1") == 2
    assert "dit.depth: 2 -> 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(dit_run):
    """The run as a DiTPipeline."""
    to = dit_run.parent / "folder"
    assert command_line.run(convert.main, ["convert", f"--model={dit_run}", f"--to={to}"]) == 0
    return to


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_folder_is_fine_tuned(rank, folder, tiny_data, tmp_path):
    run = tmp_path / "run"
    changes = ["stages=('diffusion',)", f"init_from={folder}", f"lora.rank={rank}", "sampling.sampler=own"]
    assert jobs.train_here(tiny_data, run, *(f"--config.{change}" for change in changes)) == 0
    (before, params), (after, trained) = load(folder), load(run)
    assert after.denoiser == before.denoiser.clone(dtype=after.denoiser.dtype) and after.learned_variance
    changed = [
        not np.array_equal(params["denoiser"]["transformer_blocks_0"]["attn1"][name]["kernel"], layer["kernel"])
        for name, layer in trained["denoiser"]["transformer_blocks_0"]["attn1"].items()
    ]
    assert all(changed)
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={tmp_path / 'to'}"]) == 0
    assert load(tmp_path / "to")[0].class_names == tiny.CLASS_NAMES


@pytest.mark.slow
def test_sizes_of_samples_are_multiples_of_patches(folder, tmp_path, capsys):
    command = ["sample", f"--model={folder}", f"--out={tmp_path}", "--num=1", "--steps=2", "--width=12"]
    assert command_line.run(sample.main, [*command, "--height=10"]) == 2
    assert "--height=10 must be a multiple of 4, the pixels of a patch of latents, e.g. 8" in capsys.readouterr().err
    assert command_line.run(sample.main, [*command, "--height=8"]) == 0
    assert jobs.samples(tmp_path)["images"].shape == (1, 8, 12, 1)


@pytest.mark.slow
def test_a_text_to_image_job(tiny_data, tmp_path, capsys):
    run = tmp_path / "run"
    changes = ["--config.dit.qk_norm=rms", "--config.evaluation.vlb_examples=0"]
    assert jobs.train_here(tiny_data, run, *jobs.TEXTS, *FLAGS, *changes) == 0
    attention = load(run)[1]["denoiser"]["transformer_blocks_0"]["attn2"]
    assert attention["to_out_0"]["kernel"].any()  # which begins as 0
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={tmp_path / 'to'}"]) == 2
    assert "DiTPipeline is conditioned on classes" in capsys.readouterr().err and not (tmp_path / "to").exists()
