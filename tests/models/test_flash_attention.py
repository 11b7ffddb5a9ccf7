"""FlashAttention on TPUs: its kernels, interpreted, against attention by the equation; where it is used; compiled."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.models import flash_attention as module
from ldm_jax.models.attention import attend
from ldm_jax.models.backend import compiling_for
from ldm_jax.models.flash_attention import block_sizes, flash_attention, supports
from ldm_jax.runtime.fsdp import AXES, make_mesh
from ldm_jax.runtime.operations import count_flops
from ldm_jax.runtime.topology import load_topology

SHAPES = [(1, 1024, 1024, 2, 40), (2, 1280, 1152, 1, 80), (1, 1024, 2048, 1, 256)]  # B, Lq, L, N, D


def draw(batch, queries, keys, heads, head_size, dtype=jnp.bfloat16):
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(0)
    lengths = queries, keys, keys, queries
    return [jnp.asarray(rng.normal(size=(batch, length, heads, head_size)), dtype) for length in lengths]


def output_and_gradients(attention, q, k, v, cotangent):
    out, backward = jax.vjp(attention, q, k, v)
    return [out, *backward(cotangent.astype(out.dtype))]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_attention_and_its_gradients(shape):
    arrays = draw(*shape)
    with pltpu.force_tpu_interpret_mode():
        ours = jax.jit(lambda *a: output_and_gradients(flash_attention, *a))(*arrays)
    exact = output_and_gradients(attend, *(array.astype(jnp.float32) for array in arrays))
    for one, other in zip(ours, exact):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.02 * np.abs(other).max())


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"queries": 9216, "keys": 2304}, True),
        ({"head_size": 512}, True),
        ({"platform": "cpu"}, False),
        ({"platform": "gpu"}, False),
        ({"dtype": jnp.float32}, False),
        ({"keys": 77}, False),
        ({"queries": 1000}, False),
        ({"queries": 256, "keys": 256}, False),
        ({"head_size": 160}, False),
    ],
)
def test_where_the_kernels_are_used(changed, expected, monkeypatch):
    values = {"queries": 1024, "keys": 1024, "head_size": 40, "dtype": jnp.bfloat16, "platform": "tpu"} | changed
    q, k, v, _ = draw(1, values["queries"], values["keys"], 1, values["head_size"], values["dtype"])
    used = []
    monkeypatch.setattr(module, "_kernel", lambda q, k, v: used.append(q.shape) or q)
    with compiling_for(values["platform"]):
        assert supports(q, k) is expected
        jax.eval_shape(attend, q, k, v)
        assert bool(used) is expected
        jax.eval_shape(lambda *a: attend(*a, causal=True), q, k, k)
    assert len(used) == expected  # causal attention is that of texts, which are short


@pytest.mark.parametrize(("kind", "expected"), [("TPU v3", False), ("TPU v4", True), ("TPU v5 lite", True)])
def test_which_tpus_have_the_kernels(kind, expected, monkeypatch):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    q, k, *_ = draw(1, 1024, 1024, 1, 8)
    with compiling_for("tpu"):
        assert supports(q, k) is expected


def test_each_device_of_a_mesh_has_its_rows(four_devices, monkeypatch):
    """The batch is divided over both axes of the mesh; one that does not divide is left to XLA."""
    shapes = []
    monkeypatch.setattr(module, "_kernel", lambda q, k, v: shapes.append(q.shape) or attend(q, k, v))
    q, k, v, _ = draw(4, 1024, 1024, 1, 8)
    mesh = make_mesh(2)

    @jax.jit
    def sharded(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            with compiling_for("tpu"):
                assert supports(q, k) and not supports(q[:3], k[:3])
            return flash_attention(*arrays)

    out = sharded(*jax.device_put((q, k, v), NamedSharding(mesh, PartitionSpec(AXES))))
    assert shapes == [(1, 1024, 1, 8)] and out.addressable_shards[0].data.shape == (1, 1024, 1, 8)
    np.testing.assert_array_equal(out, jax.jit(attend)(q, k, v))


@pytest.mark.parametrize(("queries", "keys", "head_size"), [(1024, 1024, 40), (9216, 2304, 64), (4096, 4096, 512)])
def test_blocks_divide_the_lengths(queries, keys, head_size):
    sizes = block_sizes(queries, keys, head_size)
    for name, size in sizes.items():
        length = 1 if name == "block_b" else queries if "_q" in name else keys
        assert length % size == 0 and (size % 128 == 0 or name == "block_b")


def test_the_operations_of_the_kernels_are_counted():
    """Two products forward; backward the scores twice, the weights' gradient twice, and three gradients."""
    q, k, v, cotangent = draw(1, 1024, 1152, 3, 40)
    product = 2 * 3 * 1024 * 1152 * 40
    assert count_flops(jax.make_jaxpr(flash_attention)(q, k, v).jaxpr) == 2 * product
    both = jax.make_jaxpr(lambda *a: output_and_gradients(flash_attention, *a))(q, k, v, cotangent)
    assert count_flops(both.jaxpr) == 9 * product


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, an optional extra")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("shape", [(4, 4096, 8, 40), (1, 9216, 5, 64), (1, 1024, 20, 64), (1, 4096, 1, 512)])
def test_the_kernels_compile_for_a_slice(shape, topology, monkeypatch):
    """The attention of Stable Diffusion at 512 and 768 pixels, of SDXL, and of their autoencoder, by both engines."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    devices = load_topology(topology).devices
    mesh, count = make_mesh(2, devices), len(devices)

    def gradients(q, k, v):
        return jax.grad(lambda *a: (attend(*a).astype(jnp.float32) ** 2).sum(), (0, 1, 2))(q, k, v)

    def sharded(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradients(*arrays)

    rows = NamedSharding(mesh, PartitionSpec(AXES))
    on_mesh = jax.ShapeDtypeStruct((count * shape[0], *shape[1:]), jnp.bfloat16, sharding=rows)
    by_device = jax.ShapeDtypeStruct((count, *shape), jnp.bfloat16)
    with compiling_for("tpu"):
        fsdp = jax.jit(sharded).lower(*3 * [on_mesh]).compile().as_text()
        pmap = jax.pmap(gradients, devices=devices).lower(*3 * [by_device]).compile().as_text()
    assert "flash_mha_bwd" in fsdp and "flash_mha_bwd" in pmap
    assert "all-gather" not in fsdp
