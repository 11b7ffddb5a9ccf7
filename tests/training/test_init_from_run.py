"""Runs that start from another run of ours: config.init_from=RUN."""

import jax
import jobs
import numpy as np
import pytest
import random_runs
import tiny
from finetuning import flags_from_run, leaves

from ldm_jax import command_line, convert, sample, train
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import fingerprint
from ldm_jax.runtime.files import read_json


def flags(base, data, workdir, *changes):
    return flags_from_run(base, data, workdir, "sampling.steps=2", "sampling.progress_every=0", *changes)


BASES = {  # changes of tests/tiny.py -> those of the run that starts from it
    "latents": ({"unet.block_out_channels": (8, 16), "unet.attention": (False, True)}, ()),
    "pixels": ({"autoencoder.type": "none"}, ()),
    "a VQ autoencoder": ({"autoencoder.type": "vq"}, ()),
    "super-resolution": ({"concat.type": "low_resolution", "concat.factor": 2}, ()),
    "inpainting": ({"concat.type": "inpainting"}, ()),
    "segmentation maps": (
        {"concat.type": "segments", "data.segments_key": "areas", "concat.num_segments": 3},
        ("data.segments_key=areas",),
    ),
    "a learned variance": ({"diffusion.variance": "learned"}, ()),
    "pixels, a learned variance": ({"diffusion.variance": "learned", "autoencoder.type": "none"}, ()),
    "another schedule": ({"diffusion.schedule": "cosine", "diffusion.prediction": "v"}, ()),
    "LoRA": ({}, ("lora.rank=2",)),
}


@pytest.mark.parametrize("case", [case if case == "LoRA" else pytest.param(case, marks=pytest.mark.slow)
                                  for case in BASES])  # fmt: skip
def test_a_run_starts_from_another(case, tiny_data, tmp_path):
    changes, more = BASES[case]
    base, run = random_runs.random_run(tmp_path / "base", changes), tmp_path / "run"
    assert command_line.run(train.main, flags(base, tiny_data, run, *more)) == 0
    (old, before), (new, after) = load(base), load(run)
    assert (new.prediction, new.process, new.image_shape) == (old.prediction, old.process, old.image_shape)
    assert new.origin.step == 4 and new.class_names == tiny.CLASS_NAMES
    assert read_json(run / "data.json")["init_from_fingerprint"] == fingerprint(old, before)
    same = {name: all(map(np.array_equal, leaves(before[name]), leaves(after[name]))) for name in after}
    assert not same["denoiser"] and same["first_stage"] and same["scale"]
    assert np.abs(jax.tree.leaves(before["denoiser"])[0] - jax.tree.leaves(after["denoiser"])[0]).max() < 0.1
    out = tmp_path / "out"
    assert command_line.run(sample.main, ["sample", f"--model={run}", f"--out={out}", "--num=4"]) == 0
    np.testing.assert_array_equal(jobs.samples(out)["images"], jobs.samples(run)["images"])
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={tmp_path / 'folder'}"]) == 0
    (exported, read), trained = load(tmp_path / "folder"), load(run)[1]
    assert exported.class_names == tiny.CLASS_NAMES and exported.process == old.process
    assert (exported.concat, exported.image_shape, exported.learned_variance) == (
        old.concat, old.image_shape, old.learned_variance)  # fmt: skip
    for name in trained:
        jax.tree.map(np.testing.assert_array_equal, read[name], trained[name])
    more = [*more, "diffusion.steps=5"]
    assert command_line.run(train.main, flags(base, tiny_data, run, *more)) == 0
    assert load(run)[0].origin.step == 5


def test_a_text_to_image_run_starts_from_another(text_run, tiny_data, tmp_path):
    """With the same tokenizer and text encoder; its export is a StableDiffusionPipeline, with the scale per channel."""
    run, out = tmp_path / "run", tmp_path / "out"
    changes = ["data.caption_key=auto", "data.label_key=none"]
    assert command_line.run(train.main, flags(text_run, tiny_data, run, *changes)) == 0
    (old, before), (new, after) = load(text_run), load(run)
    assert new.conditioning == old.conditioning and new.origin.step == 4 and new.origin.pipeline == old.origin.pipeline
    assert all(map(np.array_equal, leaves(before["conditioning"]), leaves(after["conditioning"])))
    assert not all(map(np.array_equal, leaves(before["denoiser"]), leaves(after["denoiser"])))
    command = ["sample", "--num=2", "--prompt=a bright picture", "--steps=2", "--sampler=ddim"]
    assert command_line.run(sample.main, [*command, f"--model={run}", f"--out={out}"]) == 0
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={tmp_path / 'folder'}"]) == 0
    again = tmp_path / "again"
    assert command_line.run(sample.main, [*command, f"--model={tmp_path / 'folder'}", f"--out={again}"]) == 0
    one, other = (jobs.samples(folder)["images"].astype(int) for folder in (out, again))
    assert np.abs(one - other).max() <= 1
    assert command_line.run(train.main, flags(text_run, tiny_data, run, *changes, "diffusion.steps=5")) == 0
    assert load(run)[0].origin.step == 5


REFUSED = {
    "a learned variance without its loss": (
        {"diffusion.variance": "learned"}, ("diffusion.vlb_weight=0",), "config.diffusion.vlb_weight is 0"),
    "segmentation maps without a feature": (
        {"concat.type": "segments", "data.segments_key": "areas", "concat.num_segments": 3}, (),
        "config.data.segments_key is 'none'; config.init_from="),
    "a feature without a model for it": ({}, ("data.segments_key=areas",), "takes none"),
    "other channels": ({}, ("data.channels=3",), "config.data.channels is 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_run_starts_from(case, tiny_data, tmp_path, capsys):
    changes, more, words = REFUSED[case]
    base = random_runs.random_run(tmp_path / "base", changes)
    assert command_line.run(train.main, flags(base, tiny_data, tmp_path / "run", *more)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_base_that_changed_is_refused(tiny_data, tmp_path, capsys):
    base, run = random_runs.random_run(tmp_path / "base"), tmp_path / "run"
    assert command_line.run(train.main, flags(base, tiny_data, run)) == 0
    base.rename(tmp_path / "old")
    random_runs.random_run(base, contrast=2.0)
    assert command_line.run(train.main, flags(base, tiny_data, run)) == 2
    assert "was fine-tuned from another model than config.init_from" in capsys.readouterr().err
