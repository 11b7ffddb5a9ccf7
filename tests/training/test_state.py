"""The update of a training state, and its rejection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.training.optimizer import Optimization, make_optimizer
from ldm_jax.training.state import init_state, update_if_finite

OPTIMIZATION = Optimization(10, 0.1, 0, "constant", 0.99, 0.0, 1.0)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_step_that_is_not_finite_or_not_the_next_changes_nothing(backend, monkeypatch):
    """By a branch on CPUs and a selection elsewhere."""
    optimizer = make_optimizer(OPTIMIZATION)
    start, one = init_state({"w": jnp.ones(3)}, optimizer), {"w": jnp.ones(3)}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # In a function of its own: jit would otherwise reuse the other backend's program.
    update = jax.jit(lambda loss, grads, index: update_if_finite(start, index, loss, grads, optimizer, 0.5))
    good, norm = update(0.3, one, 0)
    assert int(good.step) == 1 and float(norm) == pytest.approx(3**0.5)
    np.testing.assert_allclose(good.params["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(good.ema_params["w"], 0.91, rtol=1e-6)  # the decay of step 0 is 1 / 10
    for loss, grads, index in ((np.nan, one, 0), (0.3, {"w": jnp.array([1.0, np.inf, 1.0])}, 0), (0.3, one, 1)):
        state, _ = update(loss, grads, index)
        jax.tree.map(np.testing.assert_array_equal, state, start)
