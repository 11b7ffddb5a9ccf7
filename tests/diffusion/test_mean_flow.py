"""MeanFlow: its identity where the average velocity is known in closed form, and its Jacobian-vector products."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from ldm_jax.diffusion import mean_flow
from ldm_jax.diffusion.denoiser import from_network, over_interval
from ldm_jax.diffusion.forward import NoiseLevel
from ldm_jax.diffusion.random import sample_keys
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.solve import solve
from ldm_jax.diffusion.solvers import make_table
from ldm_jax.diffusion.timesteps import TimestepDistribution, sample_times
from ldm_jax.models.layers import timestep_embedding
from ldm_jax.models.unet import UNet

MEAN, STD = np.array([1.0, -2.0]), np.array([0.5, 1.5])  # of Gaussian data
PROCESS = make_process("rectified_flow", 20)


def std(t):
    """Of z_t, whose mean is (1 - t) MEAN."""
    return jnp.sqrt((1 - t[:, None]) ** 2 * STD**2 + t[:, None] ** 2)


def velocity(z, t):
    """v(z_t, t) of Gaussian data: the derivative of the path below."""
    slope = (t[:, None] - (1 - t[:, None]) * STD**2) / std(t) ** 2
    return -MEAN + slope * (z - (1 - t[:, None]) * MEAN)


def average_velocity(z, t, interval):
    """u(z_t, r, t): along a trajectory (z_t - (1 - t) MEAN) / std(t) is constant, so z_r is known."""
    r = t - interval
    z_r = (1 - r[:, None]) * MEAN + std(r) / std(t) * (z - (1 - t[:, None]) * MEAN)
    length = jnp.where(interval > 0, interval, 1.0)[:, None]
    return jnp.where(interval[:, None] > 0, (z - z_r) / length, velocity(z, t))


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    t = jnp.asarray(rng.uniform(0.3, 1.0, 64), jnp.float32)
    return jnp.asarray(rng.normal(size=(64, 2)), jnp.float32), t, t * jnp.asarray(rng.uniform(0.1, 0.9, 64))


def test_the_identity_on_gaussian_data(points):
    z, t, interval = points
    v = velocity(z, t)
    target = mean_flow.mean_flow_target(average_velocity, z, t, interval, v, v)
    np.testing.assert_allclose(target, average_velocity(z, t, interval), atol=2e-5)
    assert np.abs(target - v).max() > 0.1  # where u is not v
    at_zero = mean_flow.mean_flow_target(average_velocity, z, t, jnp.zeros_like(t), v, v)
    np.testing.assert_array_equal(at_zero, v)


def test_the_target_has_no_gradient(points):
    z, t, interval = points
    v = velocity(z, t)

    def target(scale):
        network = lambda *at: scale * average_velocity(*at)  # noqa: E731
        return mean_flow.mean_flow_target(network, z, t, interval, v, v).sum()

    assert jax.grad(target)(1.0) == 0


@pytest.fixture(scope="module")
def network():
    """A UNet with the layers whose gradients are written out, conditioned on a context and on an interval."""
    fields = {"in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16), "norm_num_groups": 4}
    fields |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_heads": 2}
    fields |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}
    unet = UNet(**fields, cross_attention_dim=6, time_cond_proj_dim=8)
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.normal(size=(3, 4, 4, 2)), jnp.float32), jnp.asarray(rng.normal(size=(3, 2, 6)))
    shapes = jax.eval_shape(
        unet.init, jax.random.key(0), inputs[0], jnp.zeros(3), inputs[1], timestep_cond=jnp.zeros((3, 8))
    )
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), shapes["params"])
    embed = lambda interval: jnp.cos(interval[:, None] * jnp.arange(8))  # noqa: E731

    @jax.jit
    def u(z, t, interval):
        return unet.apply({"params": params}, z, t, inputs[1], timestep_cond=embed(interval))

    return u, inputs[0]


def test_the_derivative_of_a_unet_against_finite_differences(network):
    u, z = network
    rng = np.random.default_rng(2)
    at = z, jnp.array([0.3, 0.6, 0.9]), jnp.array([0.1, 0.6, 0.2])
    along = jnp.asarray(rng.normal(size=z.shape), jnp.float32), jnp.ones(3), jnp.ones(3)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(u, at, along)
    exact, step = jax.jit(lambda at, along: mean_flow.directional_derivative(u, at, along))(at, along), 1e-2

    def moved(k):
        return u(*(x + k * step * dx for x, dx in zip(at, along)))

    difference = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
    assert np.abs(exact).max() > 0.5
    np.testing.assert_allclose(exact, difference, atol=2e-3 * np.abs(exact).max())


def test_the_derivative_is_that_of_forward_mode():
    function = lambda x, y: jnp.sin(x) * y**2 + x[:, :1]  # noqa: E731
    rng = np.random.default_rng(3)
    at, along = (tuple(jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(2)) for _ in range(2))
    _, expected = jax.jvp(function, at, along)
    np.testing.assert_allclose(mean_flow.directional_derivative(function, at, along), expected, rtol=1e-5)


CENTERS, WIDTH = np.array([[1.5, 0], [-0.75, 1.3], [-0.75, -1.3]]), 0.2  # of the mixture below


class Network(nn.Module):
    """A small network of u in the plane."""

    @nn.compact
    def __call__(self, z, t, interval):
        x = jnp.concatenate([z, timestep_embedding(4 * t, 16), timestep_embedding(4 * interval, 16)], -1)
        for _ in range(3):
            x = nn.silu(nn.Dense(96)(x))
        return nn.Dense(2)(x)


@pytest.mark.slow
def test_one_call_samples_a_mixture():
    """Trained from scratch on three Gaussians, samples of one network call have their moments and their modes."""
    module, steps, size = Network(), 2000, 1024
    params = module.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1), jnp.zeros(1))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    times = TimestepDistribution("logit_normal", -0.4, 1.0)

    def loss(params, key):
        keys = jax.random.split(key, (6, size))
        mode = jax.random.randint(keys[0][0], (size,), 0, 3)
        z0 = jnp.asarray(CENTERS)[mode] + WIDTH * jax.random.normal(keys[1][0], (size, 2))
        eps, one, other = jax.random.normal(keys[2][0], (size, 2)), *(sample_times(each, times) for each in keys[3:5])
        apart = jax.random.bernoulli(keys[5][0], 0.5, (size,))
        t, interval = jnp.where(apart, jnp.maximum(one, other), one), jnp.where(apart, jnp.abs(one - other), 0)
        z = (1 - t[:, None]) * z0 + t[:, None] * eps
        fixed = lambda *at: module.apply(jax.lax.stop_gradient(params), *at)  # noqa: E731
        target = mean_flow.mean_flow_target(fixed, z, t, interval, eps - z0, fixed(z, t, 0 * interval))
        return mean_flow.adaptive_loss(module.apply(params, z, t, interval) - target, 1.0)[0].mean()

    def step(state, key):
        params, optimizer_state = state
        updates, optimizer_state = optimizer.update(jax.grad(loss)(params, key), optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), None

    train = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(1), steps)))
    (params, _), _ = train((params, optimizer.init(params)))
    eps, one = jax.random.normal(jax.random.key(2), (4000, 2)), jnp.ones(4000)
    samples = np.asarray(eps - module.apply(params, eps, one, one))
    distance = np.linalg.norm(samples[:, None] - CENTERS, axis=-1)
    np.testing.assert_allclose(samples.mean(0), 0, atol=0.15)
    np.testing.assert_allclose(np.cov(samples.T), (1.5**2 / 2 + WIDTH**2) * np.eye(2), atol=0.25)
    np.testing.assert_allclose(np.bincount(distance.argmin(1)) / 4000, 1 / 3, atol=0.06)
    assert (distance.min(1) < 3 * WIDTH).mean() > 0.85


def test_guided_velocity_by_hand():
    v, null, cond = jnp.ones(1), jnp.full(1, 3.0), jnp.full(1, 5.0)
    assert mean_flow.guided_velocity(v, null, cond, 1.0, 0.0) == 1
    assert mean_flow.guided_velocity(v, null, cond, 2.0, 0.0) == 2 * 1 - 3
    assert mean_flow.guided_velocity(v, null, cond, 2.0, 0.25) == 1.5 * 1 + 0.25 * 5 - 0.75 * 3
    # Trained to it, u_cond = 2 * 1 - 3 whatever kappa: the guidance scale is `scale`.
    assert mean_flow.guided_velocity(v, null, -v, 2.0, 0.25) == -1


def test_adaptive_loss_by_hand():
    error = jnp.array([[[1.0], [2.0]], [[0.0], [0.1]]])
    loss, squared = mean_flow.adaptive_loss(error, 1.0)
    np.testing.assert_allclose(squared, [5, 0.01], rtol=1e-6)
    np.testing.assert_allclose(loss, [5 / 5.01, 0.5], rtol=1e-5)
    np.testing.assert_allclose(mean_flow.adaptive_loss(error, 0.0)[0], squared)
    gradient = jax.grad(lambda e: mean_flow.adaptive_loss(e, 1.0)[0].sum())(error)
    np.testing.assert_allclose(gradient[0, :, 0], 2 * error[0, :, 0] / 5.01, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ddim_samples_exactly_whatever_its_steps(steps):
    """With the true average velocity z moves along the trajectory: by any number of steps to the same point."""

    def network(z, t, cond):
        return average_velocity(z, (t + 1) / len(PROCESS), cond["interval"])

    denoise = over_interval(from_network(network, "flow", PROCESS))
    z_T = jnp.asarray(np.random.default_rng(4).normal(size=(8, 2)), jnp.float32)
    table = make_table("ddim", PROCESS, steps, prediction="flow", spacing="trailing")
    z, _ = solve(lambda z, level: denoise(z, level, {}), z_T, table, sample_keys(0, jnp.arange(8)))
    np.testing.assert_allclose(z, MEAN + STD * z_T, atol=1e-5)


def test_a_level_without_a_step_has_no_interval():
    network = over_interval(from_network(lambda z, t, cond: cond["interval"][:, None] + 0 * z, "flow", PROCESS))
    z = jnp.ones((2, 1))
    np.testing.assert_array_equal(network(z, NoiseLevel(jnp.asarray(9.0), 0.5, 0.5), {}), z)
    np.testing.assert_array_equal(network(z, NoiseLevel(jnp.asarray(9.0), 0.5, 0.5, 0.2), {}), z - 0.5 * 0.2)


def test_sample_times():
    keys = jax.random.split(jax.random.key(0), 4000)
    s = sample_times(keys, TimestepDistribution("logit_normal", -0.4, 1.0))
    logit = np.log(s / (1 - s))
    assert abs(logit.mean() + 0.4) < 0.05 and abs(logit.std() - 1) < 0.05
    s = sample_times(keys, TimestepDistribution(shift=3.0))
    np.testing.assert_allclose(np.mean(s / (3 - 2 * s)), 0.5, atol=0.02)  # back to uniform
    with pytest.raises(ValueError, match="must be one of uniform, logit_normal"):
        sample_times(keys, TimestepDistribution("normal"))
