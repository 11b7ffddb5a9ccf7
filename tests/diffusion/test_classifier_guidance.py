import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.guidance import class_log_probabilities, log_probability
from ldm_jax.diffusion.process import Process

PROCESS = Process.variance_preserving([0.81, 0.36, 0.0])


def apply(variables, z_t, t, alpha):
    """Two classes, by the sign of the first number: logits of it times the inputs alpha and 0."""
    return variables["params"] * z_t[:, :1] * jnp.stack([alpha, jnp.zeros_like(t)], axis=1)


def test_by_hand():
    classify = class_log_probabilities(apply, PROCESS)
    z_t, t = jnp.array([[1.0], [1.0], [-2.0], [5.0]]), jnp.array([0, 1, 1, 2])
    log_p = classify(jnp.float32(2.0), z_t, t)
    expected = np.array([[1.8, 0], [1.2, 0], [-2.4, 0], [0, 0]])
    expected -= np.log(np.exp(expected).sum(1, keepdims=True))
    np.testing.assert_allclose(log_p, expected, rtol=1e-6)
    np.testing.assert_allclose(log_probability(log_p, jnp.array([0, 1, 0, 1])), expected[range(4), [0, 1, 0, 1]], 1e-6)


def test_between_two_timesteps():
    log_p = class_log_probabilities(apply, PROCESS)(jnp.float32(1.0), jnp.ones((1, 1)), jnp.array([0.5]))
    np.testing.assert_allclose(jnp.exp(log_p[0, 0]), 1 / (1 + np.exp(-0.75)), rtol=1e-6)  # alpha = (0.9 + 0.6) / 2
