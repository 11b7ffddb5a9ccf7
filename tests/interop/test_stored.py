"""Loading takes little more memory than the parameters, and a CPU computes with the very arrays that were loaded."""

import tracemalloc

import jax
import jax.numpy as jnp
import ldm_files
import ml_dtypes
import numpy as np
import pytest

from ldm_jax.interop.diffusers import params_from_state_dict, state_dict_from_params
from ldm_jax.interop.stored import Stored
from ldm_jax.interop.weights import read_state_dict, write_safetensors
from ldm_jax.runtime.parallel import replicate

LAYERS = 24
TARGET = {
    f"layers_{i}": {"kernel": np.empty((3, 3, 48, 80) if i % 2 else (320, 112)), "bias": np.empty(112)}
    for i in range(LAYERS)
}
STATE = {
    name: np.random.default_rng(i).normal(size=tensor.shape).astype(np.float32)
    for i, (name, tensor) in enumerate(state_dict_from_params(TARGET).items())
}
NAME = "diffusion_pytorch_model"


@pytest.fixture(scope="module", params=[np.float32, np.float16, ml_dtypes.bfloat16, "pickled"])
def folder(request, tmp_path_factory):
    """The weights in a file of this type."""
    made = tmp_path_factory.mktemp("stored")
    if request.param == "pickled":
        ldm_files.write_checkpoint(made / f"{NAME}.bin", STATE, more="")
    else:
        write_safetensors(made / f"{NAME}.safetensors", {k: v.astype(request.param) for k, v in STATE.items()})
    return made


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_weights_are_in_memory_once(folder, dtype):
    """Of other types in the file too; then the devices have them as well."""
    tracemalloc.start()
    try:
        params = params_from_state_dict(read_state_dict(folder, dtype=dtype), TARGET)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    leaves = jax.tree.leaves(params)
    assert peak < 1.3 * sum(leaf.nbytes for leaf in leaves)
    for here, there in zip(leaves, jax.tree.leaves(replicate(params)), strict=True):
        assert here.dtype == dtype
        assert there.addressable_shards[0].data.unsafe_buffer_pointer() == here.ctypes.data


def test_what_is_computed_does_not_change_the_weights():
    """Although a step may write where its arguments were."""
    kernel = Stored(lambda: np.ones((64, 64), np.float16), np.float32).laid_out()
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    for _ in range(2):
        np.testing.assert_array_equal(step(replicate(kernel)), 2)
    np.testing.assert_array_equal(kernel, 1)
    with pytest.raises(ValueError, match="read-only"):
        kernel[0] = 2


def test_parts_are_read_when_they_are_asked_for():
    asked = []

    def view():
        asked.append("view")
        return np.arange(6, dtype=np.int32).reshape(2, 3)

    part = Stored(view, jnp.bfloat16).then(np.transpose)
    assert not asked
    array = part.laid_out()
    np.testing.assert_array_equal(array, [[0, 3], [1, 4], [2, 5]])
    assert (array.dtype, array.flags.c_contiguous, asked) == (np.int32, True, ["view"])  # integers are not cast
