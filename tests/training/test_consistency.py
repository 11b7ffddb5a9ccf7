"""Consistency distillation: its loss, and runs that end as models of few steps."""

from dataclasses import replace
from functools import cache

import diffusers_folder
import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest
import random_runs
from finetuning import fine_tune, flags_from_run, leaves, write_pictures

from ldm_jax import command_line, convert, sample, train
from ldm_jax.diffusion.consistency import pseudo_huber
from ldm_jax.diffusion.onestep import boundary_scalings
from ldm_jax.diffusion.prediction import to_z0
from ldm_jax.interop.lora_files import read_lora
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import apply_denoiser
from ldm_jax.pipeline.trainable import LoRA, Parts, trainable_of
from ldm_jax.runtime.files import read_json
from ldm_jax.training.from_config import make_diffusion_stage

ROWS = np.arange(8, dtype=np.int32)
BATCH = {"label": ROWS % 4, "id": ROWS, "step": np.int32(0)}
BATCH |= {"moments": np.random.default_rng(0).normal(size=(8, 1, 4, 4, 4)).astype(np.float32)}
BASES = {
    "eps": {},
    "rectified flow": {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "flow"},
    "a learned variance": {"diffusion.variance": "learned"},
}


@cache
def distillation(base="eps", lora=0):
    """A stage, the teacher's parameters, the first state and the frozen arrays."""
    config = random_runs.random_config(BASES[base]).unlock()
    config.diffusion.objective, config.init_from, config.lora.rank = "consistency", "base", lora
    config.consistency.guidance_min, config.consistency.guidance_max = 2.0, 3.0
    config.diffusion.label_dropout = 0.3
    model, params = random_runs.random_model(BASES[base])
    stage = make_diffusion_stage(model, trainable_of(config, model), config)
    state = jax.jit(lambda key: stage.init(key, params))(jax.random.key(0))
    frozen = stage.trainable.frozen(params) | {"table": np.arange(5, dtype=np.int32)}
    frozen |= {"teacher": stage.trainable.init(jax.random.key(1), params)}
    return stage, params, state, frozen


def moved(tree, seed):
    """Other parameters near those of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), tree)


@pytest.mark.parametrize("base, lora", [("eps", 0), ("eps", 2), ("rectified flow", 0), ("a learned variance", 0)])
def test_the_loss_by_hand(base, lora):
    stage, params, state, frozen = distillation(base, lora)
    assert isinstance(stage.trainable, LoRA if lora else Parts)
    student, target = moved(state.params, 0), moved(state.params, 1)
    example = jax.jit(stage._example)(BATCH, frozen, np.uint32(0))
    loss, _ = jax.jit(stage._loss, static_argnums=3)(student, frozen | {"target": target}, example, None)

    def z0_hat(params, z, t, label):
        cond = stage.model.conditioning.encode(params["conditioning"], label)
        output = apply_denoiser(stage.model, params, z, t, cond)[..., :2]
        alpha, sigma = (table[t][:, None, None, None] for table in (process.alpha, process.sigma))
        return to_z0(stage.model.prediction, output, z, alpha, sigma), alpha, sigma

    def consistency(trained, z, t):
        c_skip, c_out = (c[:, None, None, None] for c in boundary_scalings(t.astype(np.float64)))
        whole = stage.trainable.merge(params, trained)
        return c_skip * z + c_out * z0_hat(whole, z, t, example["dropped"])[0]

    process, start, end, z = stage.model.process, *(np.asarray(example[name]) for name in ("t", "end", "z_t"))
    cond, alpha, sigma = z0_hat(params, z, start, example["dropped"])
    null, _, _ = z0_hat(params, z, start, jnp.full(8, 4))
    z0 = null + example["scale"][:, None, None, None] * (cond - null)
    to_alpha, to_sigma = (table[end][:, None, None, None] for table in (process.alpha, process.sigma))
    reached = to_alpha * z0 + to_sigma / sigma * (z - alpha * z0)  # the step of DDIM
    expected = pseudo_huber(consistency(student, z, start) - consistency(target, reached, end), stage.huber_c)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-4)
    assert ((example["scale"] >= 2) & (example["scale"] <= 3)).all() and len(set(example["scale"].tolist())) == 8
    assert (start >= end).all() and 0 < (example["dropped"] == 4).sum() < 8
    np.testing.assert_allclose(z, alpha * example["z0"] + sigma * example["eps"], atol=1e-5)


def test_the_boundary_condition_holds_whatever_the_network():
    stage, _, state, frozen = distillation()
    example = stage._example(BATCH, frozen, np.uint32(0)) | {"t": np.zeros(8, np.int32)}
    f = stage._consistency(moved(state.params, 0), frozen, example)
    np.testing.assert_array_equal(f, example["z_t"])


def test_the_target_is_the_average_and_the_teacher_stays():
    stage, _, state, frozen = distillation()
    step = jax.jit(stage.step)
    _, metrics = step(state, frozen, BATCH, np.uint32(0))
    _, other = step(state.replace(ema_params=moved(state.params, 1)), frozen, BATCH, np.uint32(0))
    assert metrics["loss"] != other["loss"]
    example = jax.jit(stage._example)(BATCH, frozen, np.uint32(0))
    loss = jax.jit(lambda target, frozen: stage._loss(state.params, frozen | {"target": target}, example, None)[0])
    gradient = jax.grad(loss)(state.params, frozen)
    assert not any(np.any(leaf) for leaf in leaves(gradient))
    tensors = jax.jit(stage.trace)(state, frozen, BATCH, np.uint32(0))
    np.testing.assert_allclose(tensors["loss"], metrics["loss"], rtol=1e-5)


def test_validation_is_at_the_mean_scale():
    stage, _, state, frozen = distillation()
    batch = BATCH | {"t": np.arange(8, dtype=np.int32)}

    @jax.jit
    def validated(params, low, high, frozen):
        return replace(stage, guidance_min=low, guidance_max=high).validate(params, frozen, batch, np.uint32(0))["loss"]

    losses = validated(state.params, 2.0, 3.0, frozen)
    np.testing.assert_array_equal(losses, validated(state.params, 2.5, 2.5, frozen))
    assert (losses[1:] != validated(state.params, 2.0, 2.0, frozen)[1:]).all()
    assert losses.shape == (8,) and losses[0] == 0 and (losses[1:] > 0).all()  # at t = 0 nothing is to be learned
    again = validated(moved(state.params, 0), 2.0, 3.0, frozen)
    assert (again[1:] != losses[1:]).all()


def flags(base, data, workdir, *changes):
    return flags_from_run(base, data, workdir, "sampling.progress_every=4", *changes, config="lcm")


@pytest.mark.slow
def test_a_run(tiny_data, tmp_path):
    """It ends as a model that is sampled by `lcm` in four steps, and so is its export."""
    base, run, out = random_runs.random_run(tmp_path / "base"), tmp_path / "run", tmp_path / "out"
    assert command_line.run(train.main, flags(base, tiny_data, run)) == 0
    (_, before), (model, after) = load(base), load(run)
    assert (model.defaults.sampler, model.defaults.steps, model.defaults.guidance) == ("lcm", 4, 1.0)
    assert not all(map(np.array_equal, leaves(before["denoiser"]), leaves(after["denoiser"])))
    assert command_line.run(sample.main, ["sample", f"--model={run}", f"--out={out}", "--num=4"]) == 0
    np.testing.assert_array_equal(jobs.samples(out)["images"], jobs.samples(run)["images"])
    folder = tmp_path / "folder"
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={folder}"]) == 0
    assert read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"] == "LCMScheduler"
    exported, _ = load(folder)
    assert (exported.defaults.sampler, exported.defaults.steps) == ("lcm", 4)
    assert command_line.run(train.main, flags(base, tiny_data, run, "diffusion.steps=5")) == 0
    assert load(run)[0].origin.step == 5


@pytest.mark.slow
def test_a_run_of_lora(tiny_data, tmp_path):
    """Its file makes the base the same model of few steps."""
    base, run = random_runs.random_run(tmp_path / "base"), tmp_path / "run"
    assert command_line.run(train.main, flags(base, tiny_data, run, "lora.rank=2", "diffusion.ema_decay=0.0")) == 0
    assert len(read_lora(run / "pytorch_lora_weights.safetensors")) == 8 * 4  # layers of attention
    command = ["sample", f"--model={base}", f"--lora={run}/pytorch_lora_weights.safetensors", "--sampler=lcm"]
    command += ["--steps=4", "--guidance=1", "--num=4", f"--out={tmp_path / 'out'}"]
    assert command_line.run(sample.main, command) == 0
    one, other = (jobs.samples(folder)["images"].astype(int) for folder in (run, tmp_path / "out"))
    assert np.abs(one - other).max() <= 1


@pytest.mark.slow
def test_lcm_lora_of_stable_diffusion(tmp_path):
    """By the recipe as it is: the fine-tuned pipeline has LCMScheduler, as `from_config` makes it of the base's."""
    home, folder = tmp_path, tmp_path / "folder"
    diffusers_folder.write_stable_diffusion(home / "model")
    write_pictures(home / "pictures")
    changes = ("--config=configs/lcm.py", "--config.lora.rank=2", "--config.diffusion.ema_decay=0.0")
    assert fine_tune(home, "run", *changes) == 0
    (model, params), (base, before) = load(home / "run"), load(home / "model")
    assert model.defaults.sampler == "lcm" and all(
        map(np.array_equal, leaves(before["conditioning"]), leaves(params["conditioning"]))
    )
    assert command_line.run(convert.main, ["convert", f"--model={home / 'run'}", f"--to={folder}"]) == 0
    exported, _ = load(folder)
    assert exported.origin.schedulers["scheduler"]["_class_name"] == "LCMScheduler"
    one, other = (each.defaults.solver("lcm") for each in (exported, base))
    assert one._replace(options=other.options) == other and one.options == other.options | {"eta": 0.0}
    assert exported.process == base.process and exported.prediction == base.prediction
    images = []
    weights = f"--lora={home / 'run'}/pytorch_lora_weights.safetensors"
    for more in ([f"--model={home / 'model'}", weights, "--sampler=lcm"], [f"--model={folder}"]):
        out = tmp_path / f"out{len(images)}"
        command = ["sample", *more, "--prompt=low", "--num=2", "--steps=2", "--guidance=1", "--height=16", "--width=16"]
        assert command_line.run(sample.main, [*command, f"--out={out}"]) == 0
        images.append(jobs.samples(out)["images"].astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1
