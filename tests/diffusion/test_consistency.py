"""Consistency distillation: the boundary condition, the teacher's steps, the loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.consistency import distilled_steps, pseudo_huber
from ldm_jax.diffusion.onestep import boundary_scalings
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.spacing import noise_levels


def test_the_boundary_condition():
    """f(z, 0) = z; from the first timestep on f is nearly z0_hat (diffusers' numbers)."""
    assert boundary_scalings(0) == (1, 0)
    np.testing.assert_allclose(boundary_scalings(19), (0.25 / (190**2 + 0.25), 190 / (190**2 + 0.25) ** 0.5))
    c_skip, c_out = boundary_scalings(jnp.array([0.0, 0.05, 999.0]))
    np.testing.assert_allclose(c_skip, [1, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(c_out, [0, 0.5**0.5, 1], atol=1e-6)


@pytest.mark.parametrize("T, count, skip", [(1000, 50, 20), (20, 20, 1), (150, 50, 3)])
def test_the_steps_of_the_teacher(T, count, skip):
    """From every timestep of the sampler `lcm` to the next one, the last to 0."""
    start, end = (np.asarray(each) for each in distilled_steps(jnp.arange(T), T))
    levels = noise_levels("leading", make_process("cosine", T), count, grid="lcm")
    np.testing.assert_array_equal(np.unique(start), [level.t for level in levels][::-1])
    np.testing.assert_array_equal(end, np.maximum(start - skip, 0))
    assert (np.abs(start - np.arange(T)) < skip).all() and start[-1] == T - 1


def test_a_grid_that_does_not_reach_noise_is_refused():
    with pytest.raises(ValueError, match="a multiple of 50 timesteps, or fewer; got 130"):
        distilled_steps(jnp.arange(130), 130)


def test_pseudo_huber_by_hand():
    error = jnp.array([[[3.0], [0.0]], [[1e-4], [-1e-4]]])
    expected = [(np.hypot(3, 4) - 4) / 2, np.hypot(1e-4, 4) - 4]
    np.testing.assert_allclose(pseudo_huber(error, 4.0), expected, atol=1e-6)
    np.testing.assert_allclose(pseudo_huber(error, 1e-9)[0], 1.5, rtol=1e-6)
