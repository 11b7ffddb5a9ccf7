import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ldm_jax.models.classifier import NoisyClassifier

TINY = {
    "num_classes": 3,
    "block_out_channels": (4, 8),
    "attention": (False, True),
    "attention_heads": 2,
    "norm_num_groups": 2,
}


def inputs(size=(6, 6)):
    z_t = np.random.default_rng(0).normal(size=(2, *size, 2)).astype(np.float32)
    return z_t, np.array([3, 500]), np.array([0.9, 0.4], np.float32)


def test_gradients_reach_every_parameter(random_params):
    module, args = NoisyClassifier(**TINY), inputs((7, 7))
    loss = lambda p: jnp.mean(module.apply({"params": p}, *args) ** 2)  # noqa: E731
    grads = flatten_dict(jax.jit(jax.grad(loss))(random_params(module, *args)))
    assert all(np.isfinite(g).all() for g in grads.values())
    # A softmax does not see what is added to all its scores, so the keys' biases get no gradient.
    idle = [path for path, g in grads.items() if not np.abs(g).max() > 1e-7]
    assert {path[-2:] for path in idle} <= {("to_k", "bias")}
    attentions = {path[:2] for path in grads if "to_q" in path}
    assert attentions == {("down_blocks_1", "attentions_0"), ("mid_block", "attentions_0")}


def test_samples_are_independent_and_time_and_signal_matter(random_params):
    module, (z_t, t, alpha) = NoisyClassifier(**TINY), inputs()
    apply = jax.jit(module.apply)
    params = {"params": random_params(module, z_t, t, alpha)}
    out = apply(params, z_t, t, alpha)
    assert out.shape == (2, 3)
    np.testing.assert_allclose(apply(params, z_t[::-1], t[::-1], alpha[::-1])[::-1], out, atol=1e-5)
    np.testing.assert_allclose(apply(params, z_t, t.astype(np.float32), alpha), out, atol=1e-5)
    for changed in ((z_t[::-1], t, alpha), (z_t, t[::-1], alpha), (z_t, t, alpha[::-1])):
        assert np.abs(apply(params, *changed) - out).max() > 1e-3


def test_what_z_t_tells_fades_with_its_signal(random_params):
    """Logits are the prior where there is no signal, and their gradient falls in proportion to it."""
    module, (z_t, t, _) = NoisyClassifier(**TINY | {"block_out_channels": (4,), "attention": (False,)}), inputs()
    params = random_params(module, z_t, t, np.ones(2, np.float32))
    gradient = jax.jit(
        jax.grad(lambda z_t, alpha: module.apply({"params": params}, z_t, t, jnp.full(2, alpha))[:, 0].sum())
    )
    np.testing.assert_allclose(gradient(z_t, 1e-3) * 1e3, gradient(z_t, 1.0), rtol=1e-3, atol=1e-6)
    logits = module.apply({"params": params}, z_t, t, jnp.zeros(2))
    np.testing.assert_allclose(logits, np.tile(params["prior"], (2, 1)), rtol=1e-6)


def test_half_precision_ends_in_float32():
    module = NoisyClassifier(**TINY, dtype=jnp.bfloat16)
    out, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), *inputs()))
    assert out.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


BAD_FIELDS = [
    ({"num_classes": 1}, "2 or more classes; got 1"),
    ({"attention": (True,)}, "one entry for each of block_out_channels"),
    ({"norm_num_groups": 3}, "norm_num_groups=3"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_bad_fields(fields, message):
    module = NoisyClassifier(**TINY | fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), *inputs())
