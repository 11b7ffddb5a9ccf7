import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.conditioning import ClassEmbedder


def test_each_label_has_its_tokens():
    embedder = ClassEmbedder(num_classes=3, dim=4, tokens=2)
    table = np.arange(4 * 8, dtype=np.float32).reshape(4, 8)
    params = {"params": {"embedding": {"embedding": table}}}
    out = embedder.apply(params, jnp.array([0, 3]))
    assert np.array_equal(out, [[[0, 1, 2, 3], [4, 5, 6, 7]], [[24, 25, 26, 27], [28, 29, 30, 31]]])
    assert embedder.null == 3


def test_an_unconditional_model_has_the_null_row_alone():
    embedder = ClassEmbedder(num_classes=0, dim=4)
    out, variables = embedder.init_with_output(jax.random.key(0), jnp.zeros(5, jnp.int32))
    assert out.shape == (5, 1, 4)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 4
    assert embedder.null == 0


def test_a_label_out_of_range_never_passes_for_a_class():
    embedder = ClassEmbedder(num_classes=3, dim=2)
    params = embedder.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    assert np.isnan(embedder.apply(params, jnp.array([4]))).all()


def test_half_precision():
    out, variables = ClassEmbedder(2, 4, dtype=jnp.bfloat16).init_with_output(jax.random.key(0), jnp.array([1]))
    assert out.dtype == jnp.bfloat16
    assert variables["params"]["embedding"]["embedding"].dtype == jnp.float32


@pytest.mark.parametrize("num_classes, tokens", [(-1, 1), (3, 0)])
def test_bad_sizes(num_classes, tokens):
    with pytest.raises(ValueError, match=f"got {num_classes} and {tokens}"):
        ClassEmbedder(num_classes, 4, tokens).init(jax.random.key(0), jnp.zeros(1, jnp.int32))
