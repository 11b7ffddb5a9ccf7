"""The training of MeanFlow: its loss, its intervals, and a run whose samples take one network call."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest
import tiny

from ldm_jax import command_line, convert, sample, train
from ldm_jax.diffusion.mean_flow import adaptive_loss, directional_derivative
from ldm_jax.pipeline.from_config import from_config, init_params
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import apply_denoiser
from ldm_jax.pipeline.trainable import trainable_of
from ldm_jax.training.from_config import make_diffusion_stage

FIELDS = {
    "diffusion.objective": "mean_flow",
    "diffusion.schedule": "rectified_flow",
    "diffusion.prediction": "flow",
    "diffusion.timestep_sampling": "logit_normal",
    "diffusion.timestep_mean": -0.4,
    "sampling.steps": 1,
    "sampling.guidance": 1.0,
}
FLAGS = [f"--config.{name}={value}" for name, value in FIELDS.items()]
FROZEN = {"first_stage": {}, "shift": np.zeros(2, np.float32), "scale": np.ones(2, np.float32)}
FROZEN |= {"table": np.arange(5, dtype=np.int32)}  # four classes and the null condition


@cache
def stage_and_params(**changes):
    """A stage of the tiny config with `changes` ("a__b" is a.b), and parameters at random, none of them 0."""
    config = tiny.get_config().unlock()
    config.update_from_flattened_dict(FIELDS | {name.replace("__", "."): value for name, value in changes.items()})
    model = from_config(config.lock(), tiny.CLASS_NAMES)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)
    return make_diffusion_stage(model, trainable_of(config, model), config), params


def batch(n=8, step=0, first=0):
    rows = np.arange(first, first + n, dtype=np.int32)
    moments = np.random.default_rng(0).normal(size=(16, 1, 4, 4, 4)).astype(np.float32)[rows]
    return {"moments": moments, "label": rows % 4, "id": rows, "step": np.int32(step)}


def velocity(stage, params, example, label, z_t, time, interval):
    cond = stage.model.conditioning.encode(params["conditioning"], label) | {"interval": interval}
    return apply_denoiser(stage.model, params, z_t, time * len(stage.model.process) - 1, cond)


@pytest.mark.parametrize(
    "changes",
    [{}, {"mean_flow__tangent": "network", "mean_flow__adaptive_power": 0.5},
     {"mean_flow__guidance": 2.0, "diffusion__label_dropout": 0.5},
     {"mean_flow__guidance": 2.0, "mean_flow__kappa": 0.25, "diffusion__label_dropout": 0.5}],
)  # fmt: skip
def test_the_loss_by_hand(changes):
    stage, params = stage_and_params(mean_flow__interval_ratio=0.7, **changes)
    example = jax.jit(stage._example)(batch(), FROZEN, np.uint32(0))
    (loss, metrics), gradient = jax.jit(jax.value_and_grad(stage._loss, has_aux=True), static_argnums=3)(
        params, FROZEN, example, None
    )

    def by_hand(params):
        z_t, t, h, dropped = (example[name] for name in ("z_t", "time", "interval", "dropped"))
        u = lambda params, label, *at: velocity(stage, params, example, label, *at)  # noqa: E731
        now, fixed = jnp.zeros_like(h), jax.lax.stop_gradient(params)
        v = example["eps"] - example["z0"]
        if "mean_flow__guidance" in changes:
            null, cond = u(fixed, jnp.full_like(dropped, 4), z_t, t, now), u(fixed, dropped, z_t, t, now)
            guided = 1.5 * v + 0.25 * cond - 0.75 * null if "mean_flow__kappa" in changes else 2 * v - null
            v = jnp.where((dropped == 4)[:, None, None, None], v, guided)
        tangent = u(fixed, dropped, z_t, t, now) if "mean_flow__tangent" in changes else v
        one = jnp.ones_like(t)
        du = directional_derivative(lambda *at: u(fixed, dropped, *at), (z_t, t, h), (tangent, one, one))
        error = u(params, dropped, z_t, t, h) - jax.lax.stop_gradient(v - h[:, None, None, None] * du)
        loss, squared = adaptive_loss(error, changes.get("mean_flow__adaptive_power", 1.0))
        return loss.mean(), squared.mean() / 32

    (expected, squared), expected_gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params)
    assert "mean_flow__guidance" not in changes or 0 < (example["dropped"] == 4).sum() < 8
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["squared_error"], squared, rtol=1e-4)
    for new, old in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient)):
        np.testing.assert_allclose(new, old, rtol=2e-3, atol=2e-3 * np.abs(old).max() + 1e-7)


def test_the_intervals():
    stage, _ = stage_and_params(mean_flow__interval_ratio=0.7)
    make_example = jax.jit(stage._example)
    examples = [make_example(batch(16, step), FROZEN, np.uint32(0)) for step in range(40)]
    time, interval = (np.concatenate([example[name] for example in examples]) for name in ("time", "interval"))
    assert abs((interval > 0).mean() - 0.7) < 0.06
    assert (interval >= 0).all() and (interval < time).all() and (time < 1).all()
    whole = time[interval == 0]
    for t in (whole, time[interval > 0]):  # the later of two normal logits with mean -0.4 and deviation 1
        assert abs(np.log(t / (1 - t)).mean() - (-0.4 + np.pi**-0.5)) < 0.2
    example, at = examples[0], examples[0]["time"][:, None, None, None]
    np.testing.assert_allclose(example["z_t"], (1 - at) * example["z0"] + at * example["eps"], atol=1e-6)
    np.testing.assert_allclose(example["t"], 20 * example["time"] - 1, atol=1e-5)
    part = make_example(batch(4, 0, first=8), FROZEN, np.uint32(0))
    np.testing.assert_array_equal(part["interval"], example["interval"][8:12])
    np.testing.assert_array_equal(part["z_t"], example["z_t"][8:12])


def test_without_intervals_it_is_flow_matching():
    stage, params = stage_and_params(mean_flow__interval_ratio=0.0, mean_flow__adaptive_power=0.0)
    example = jax.jit(stage._example)(batch(), FROZEN, np.uint32(0))
    u = jax.jit(lambda params: velocity(stage, params, example, example["dropped"], example["z_t"], example["time"],
                                        jnp.zeros(8)))(params)  # fmt: skip
    loss, metrics = jax.jit(stage._loss, static_argnums=3)(params, FROZEN, example, None)
    expected = jnp.mean((u - (example["eps"] - example["z0"])) ** 2)
    np.testing.assert_allclose(metrics["squared_error"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, 32 * expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_it_learns(dtype):
    changes = {"dtype": dtype, "diffusion__steps": 80, "diffusion__learning_rate": 1e-2, "diffusion__warmup_steps": 0}
    changes["diffusion__timestep_mean"] = -2.0  # of early times, where z_t tells more of the velocity
    stage, _ = stage_and_params(mean_flow__tangent="network", **changes)
    state, errors = jax.jit(lambda key: stage.init(key, init_params(stage.model, key)))(jax.random.key(0)), []
    step = jax.jit(stage.step)
    for number in range(80):
        state, metrics = step(state, FROZEN, batch(step=number), np.uint32(0))
        errors.append(float(metrics["squared_error"]))
    assert np.mean(errors[-10:]) < 0.75 * np.mean(errors[:10]), errors
    projection = state.params["denoiser"]["time_embedding"]["cond_proj"]["kernel"]
    assert np.abs(projection).max() > 0  # which starts at 0


def test_the_interval_has_no_effect_at_first():
    stage, _ = stage_and_params()
    params = jax.jit(lambda key: init_params(stage.model, key))(jax.random.key(0))
    params["denoiser"]["conv_out"]["kernel"] += 1.0
    at, label = (jnp.ones((2, 4, 4, 2)), jnp.full(2, 0.5)), jnp.zeros(2, jnp.int32)
    u = jax.jit(lambda interval: velocity(stage, params, {}, label, *at, interval))
    np.testing.assert_array_equal(*(u(jnp.full(2, interval)) for interval in (0.0, 0.5)))


@pytest.mark.slow
def test_a_run(tiny_data, tmp_path, capsys):
    """It is trained, resumed and sampled as any other; its samples take one network call, or a few by ddim."""
    run, out = tmp_path / "run", tmp_path / "out"
    flags = [*FLAGS, "--config.evaluation.vlb_examples=8", "--config.sampling.progress_every=4"]
    assert jobs.train_here(tiny_data, run, *flags) == 0
    model, params = load(run)
    assert model.mean_flow and model.guidance_dim is None and model.origin.step == 8
    assert params["denoiser"]["time_embedding"]["cond_proj"]["kernel"].shape == (8, 8)
    assert jobs.samples(run)["images"].shape == (8, 8, 8, 1)
    command = ["sample", f"--model={run}", "--num=4"]
    for more, status in ((["--steps=3"], 0), (["--sampler=unipc"], 2), (["--eta=0.5"], 2)):
        assert command_line.run(sample.main, [*command, f"--out={out}", *more]) == status
    assert "is sampled by ddim alone" in (err := capsys.readouterr().err) and "it must be 0 for a MeanFlow model" in err
    assert command_line.run(convert.main, ["convert", f"--model={run}", f"--to={tmp_path / 'folder'}"]) == 2
    assert "a MeanFlow model cannot be written for diffusers" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
    command = ["train", "--config=configs/finetune.py", f"--config.init_from={run}", f"--workdir={tmp_path / 'tuned'}"]
    data = [f"--config.data.dir={tiny_data}", "--config.data.name=tiny", "--config.data.image_size=8"]
    assert command_line.run(train.main, [*command, *data, "--config.data.channels=1"]) == 2
    assert "is a MeanFlow model, which is trained from scratch only" in capsys.readouterr().err


def test_equal_stages_are_equal():
    stage, _ = stage_and_params()
    assert stage == replace(stage) and hash(stage) == hash(replace(stage))
    assert stage != replace(stage, kappa=0.5)
