"""Counts of compiled programs: traffic and collectives of small ones on four devices, and the notations of TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.runtime.hlo import count_collectives, memory_traffic, parse, shape_bytes


def text_of(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


@pytest.fixture
def mesh(four_devices):
    return Mesh(np.array(jax.devices()), ("x",))


def collective(mesh, function, out, shape=(8, 16)):
    """The collectives of a function of the shards of an array, along its first axis."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=out, check_vma=False)
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    return count_collectives(text_of(mapped, jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)))


SHARDED, WHOLE = PartitionSpec("x"), PartitionSpec()
ARRAY, SHARD = 8 * 16 * 4, 2 * 16 * 4

# function of a shard, the sharding of its result, kind -> (count, bytes, bytes that a device sends)
KINDS = {
    "all-reduce": (lambda x: lax.psum(x, "x"), WHOLE, (1, SHARD, 2 * SHARD * 3 / 4)),
    "all-gather": (lambda x: lax.all_gather(x, "x", tiled=True), WHOLE, (1, ARRAY, ARRAY * 3 / 4)),
    "all-to-all": (lambda x: lax.all_to_all(x, "x", 1, 0, tiled=True), SHARDED, (1, SHARD, SHARD * 3 / 4)),
    "collective-permute": (lambda x: lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)]), SHARDED,
                           (1, SHARD, SHARD)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_collectives_of_a_compiled_program_are_counted(kind, mesh):
    function, out, expected = KINDS[kind]
    assert collective(mesh, function, out) == {kind: expected}


def test_a_reduce_scatter_counts_with_the_array_that_is_reduced(mesh):
    found = collective(mesh, lambda x: lax.psum_scatter(x, "x", tiled=True), SHARDED, (16, 16))
    assert set(found) == {"reduce-scatter"}
    array = 4 * 16 * 4
    assert found["reduce-scatter"] == (1, array, array * 3 / 4)


def test_collectives_in_a_loop_count_with_its_length(mesh):
    def loop(x):
        return lax.fori_loop(0, 5, lambda _, y: lax.psum(y, "x") * 0.5, x)

    assert collective(mesh, loop, SHARDED) == {"all-reduce": (5, 5 * SHARD, 5 * 2 * SHARD * 3 / 4)}


def test_programs_of_one_device_have_no_collectives():
    assert count_collectives(text_of(lambda x: x @ x, np.zeros((4, 4), np.float32))) == {}


def test_each_fusion_reads_its_operands_and_writes_its_result_once():
    x = np.zeros((64, 32), np.float32)
    fused = memory_traffic(text_of(lambda x, y: jnp.tanh(x) * 2 + y, x, x))
    assert fused == 3 * x.nbytes


def test_traffic_in_a_loop_counts_with_its_length():
    w = np.zeros((128, 128), np.float32)

    def loop(w, length):
        return lax.scan(lambda y, _: (jnp.tanh(y @ w), None), w, None, length=length)[0]

    one, three, five = (memory_traffic(text_of(loop, w, n, static_argnums=1)) for n in (1, 3, 5))
    assert five - three >= 2 * 3 * w.nbytes  # a product reads two matrices and writes one
    assert one < three < five


TPU = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%start (p: bf16[8,128]) -> bf16[128,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %g.1 = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=1,'b'=16] {'b'}
}

%done (q: bf16[8,128]) -> bf16[128,128] {
  %q = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %g.2 = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%q), channel_id=7, replica_groups=mesh['a'=1,'b'=16] {'b'}
}

ENTRY %main (x: bf16[8,128], y: f32[1000]) -> (f32[1000], f32[256]) {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[1000]{0:T(1024)} parameter(1)
  %copy-start = (bf16[8,128]{1,0:S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %f.1 = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} fusion(%copy-done), kind=kCustom, calls=%start
  %f.2 = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} fusion(%copy-done), kind=kCustom, calls=%done
  %r.1 = f32[1000]{0:T(1024)} all-reduce(%y), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %r.2 = f32[1000]{0:T(1024)} all-reduce(%r.1), channel_id=1, replica_groups=[8,2]<=[16], to_apply=%add
  %s = ((f32[1000]{0}), f32[256]{0:S(1)}, s32[]{:S(2)}) slice-start(%r.2), slice={[0:256]}
  %t = f32[256]{0:T(256)S(1)} slice-done(%s)
  ROOT %result = (f32[1000]{0}, /*index=1*/f32[256]{0:S(1)}) tuple(%r.2, %t)
}
"""


def test_the_text_of_a_tpu_program_is_read():
    """Asynchronous collectives are in two fusions, arrays in vector memory are no traffic, layouts have brackets."""
    computations, entry = parse(TPU)
    assert entry == "main" and len(computations) == 4
    assert [each.opcode for each in computations["main"]][-2:] == ["slice-done", "tuple"]
    assert count_collectives(TPU) == {
        "all-gather": (1, 128 * 128 * 2, 128 * 128 * 2 * 15 / 16),
        "all-reduce": (2, 8000, 2 * 8000 / 2),
    }
    copied, reduced, sliced = 8 * 128 * 2, 2 * 2 * 4000, 256 * 4
    assert memory_traffic(TPU) == pytest.approx(copied + reduced + sliced, abs=8)


ASYNCHRONOUS = """HloModule step

%start (p: f32[8,128]) -> (f32[8,128], f32[128,128]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %g.1 = f32[128,128]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups={{0,1}}
  ROOT %c.1 = (f32[8,128]{1,0}, f32[128,128]{1,0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p.0: f32[8,128], p.1: f32[128,128], p.2: f32[1000]) -> (f32[1000], f32[8,128], f32[128,128]) {
  %p.0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p.1 = f32[128,128]{1,0:T(8,128)} parameter(1)
  %p.2 = f32[1000]{0:T(1024)} parameter(2)
  %g.2 = f32[128,128]{1,0:T(8,128)} all-gather(%p.0), channel_id=7, replica_groups={{0,1}}
  %negate = f32[1000]{0:T(1024)} negate(%p.2)
  ROOT %t = (f32[1000]{0}, f32[8,128]{1,0}, f32[128,128]{1,0}) tuple(%negate, %p.0, %g.2)
}

%done (q.0: f32[8,128], q.1: f32[128,128]) -> f32[128,128] {
  %q.0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %q.1 = f32[128,128]{1,0:T(8,128)} parameter(1)
  %g.3 = f32[128,128]{1,0:T(8,128)} all-gather(%q.0), channel_id=7, replica_groups={{0,1}}
  ROOT %c.2 = f32[128,128]{1,0:T(8,128)} custom-call(%q.0, %q.1, %g.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[8,128], y: f32[1000]) -> (f32[1000], f32[128,128]) {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %y = f32[1000]{0:T(1024)} parameter(1)
  %b = f32[64]{0:T(1024)} custom-call(), custom_call_target="AllocateBuffer"
  %f.1 = (f32[8,128]{1,0}, f32[128,128]{1,0}) fusion(%x), kind=kCustom, \
output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %e.0 = f32[8,128]{1,0} get-tuple-element(%f.1), index=0
  %e.1 = f32[128,128]{1,0} get-tuple-element(%f.1), index=1
  %f.2 = (f32[1000]{0}, f32[8,128]{1,0}, f32[128,128]{1,0}) fusion(%e.0, %e.1, %y), kind=kOutput, \
output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%goes_on
  %e.2 = f32[1000]{0} get-tuple-element(%f.2), index=0
  %e.3 = f32[8,128]{1,0} get-tuple-element(%f.2), index=1
  %e.4 = f32[128,128]{1,0} get-tuple-element(%f.2), index=2
  %f.3 = f32[128,128]{1,0} fusion(%e.3, %e.4), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%done
  ROOT %result = (f32[1000]{0}, f32[128,128]{1,0}) tuple(%e.2, %f.3)
}
"""


def test_an_asynchronous_collective_moves_its_arrays_once():
    """However many fusions it goes through: they hand its arrays on in place."""
    shard, array, others = 8 * 128 * 4, 128 * 128 * 4, 2 * 1000 * 4
    assert memory_traffic(ASYNCHRONOUS) == shard + array + others
    assert count_collectives(ASYNCHRONOUS) == {"all-gather": (1, array, array / 2)}


def test_bytes_of_shapes():
    assert shape_bytes("(f32[2,3]{1,0}, bf16[4]{0:T(8)S(1)}, pred[], token[])") == 24 + 8 + 1
    assert shape_bytes("(f32[2,3]{1,0}, bf16[4]{0:T(8)S(1)})", on_chip=False) == 24
    assert shape_bytes("s4[16]") == 8
    assert shape_bytes("f8e4m3fn[16]") == 16
