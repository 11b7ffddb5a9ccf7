"""What the networks' tests share: parameters without the seconds that compiling an initialisation takes."""

import jax
import numpy as np
import pytest
from flax.traverse_util import path_aware_map


@pytest.fixture
def initialise():
    """A function (module, *inputs, layer="") -> what `module.init` draws, or draws for that one layer (much faster)."""

    def draw(module, *args, layer=""):
        def init(key):
            params = module.init(key, *args)["params"]
            return params[layer] if layer else params

        return jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(0))

    return draw


@pytest.fixture
def random_params():
    """A function (module, *inputs, **inputs) -> parameters of the right shapes, none of them 0, from NumPy."""

    def make(module, *args, **kwargs):
        rng = np.random.default_rng(0)

        def draw(path, leaf):
            value = rng.normal(size=leaf.shape)
            if path[-1] == "scale":
                value = 1 + 0.2 * value
            elif path[-1] == "kernel":
                value /= np.sqrt(np.prod(leaf.shape[:-1]))
            return value.astype(leaf.dtype)

        return path_aware_map(draw, jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)["params"])

    return make
