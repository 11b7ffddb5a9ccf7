import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.training.state import make_optimizer

FIELDS = {"steps": 10, "learning_rate": 0.1, "adam_b2": 0.99, "weight_decay": 0.0, "clip_norm": 1.0}


@pytest.mark.parametrize(
    ("decay", "warmup_steps", "expected"),
    [
        ("constant", 0, [0.1, 0.1, 0.1]),
        ("constant", 2, [0.0, 0.05, 0.1]),
        ("cosine", 0, [0.1, 0.05 * (1 + np.cos(0.1 * np.pi)), 0.05 * (1 + np.cos(0.2 * np.pi))]),
    ],
)
def test_learning_rate(decay, warmup_steps, expected):
    """Of a gradient that stays the same, Adam makes steps as long as the rate."""
    optimizer = make_optimizer(decay=decay, warmup_steps=warmup_steps, **FIELDS)
    params = jnp.zeros(())
    state, steps = optimizer.init(params), []
    for _ in expected:
        updates, state = optimizer.update(jnp.ones(()), state, params)
        params = optax.apply_updates(params, updates)
        steps.append(-float(updates))
    np.testing.assert_allclose(steps, expected, rtol=1e-5)
