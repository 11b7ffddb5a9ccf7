"""FlashAttention (Dao 2022) on TPUs, by the Pallas kernels of JAX: the scores of attention never go to memory."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from ldm_jax.models.backend import target_platform

LEAST = 1024  # positions; the scores of fewer are small
EARLIER = ("TPU v2", "TPU v3")  # kinds of devices that the kernels are not tested for
LANES = 128  # of an array's last axis; smaller heads are padded to it


def supports(q: Array, k: Array) -> bool:
    """Whether the kernels, forward and backward, are for these queries [B, Lq, N, D] and keys [B, L, N, D].

    They have no derivative of second order, for which the arrays must be float32 (see `diffusion.mean_flow`).
    """
    lengths = q.shape[1], k.shape[1]
    long = min(lengths) >= LEAST and not any(length % LANES for length in lengths)
    head_size = q.shape[-1] <= LANES or q.shape[-1] in (2 * LANES, 4 * LANES)
    half_precision = q.dtype == k.dtype == jnp.bfloat16
    divides = q.shape[0] % _mesh_size() == 0
    return _on_tpu_v4_or_later() and long and head_size and half_precision and divides


def flash_attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(D)) v of q [B, Lq, N, D], k and v [B, L, N, D] bfloat16 -> [B, Lq, N, D].

    In a program that is sharded over a mesh (see `runtime.fsdp`), B is divided over all of its axes.
    """
    if _mesh_size() == 1:
        return _kernel(q, k, v)
    rows = PartitionSpec(jax.sharding.get_abstract_mesh().axis_names)  # XLA cannot divide a kernel by itself
    return jax.shard_map(_kernel, in_specs=rows, out_specs=rows, check_vma=False)(q, k, v)


def _on_tpu_v4_or_later() -> bool:
    return target_platform() == "tpu" and jax.local_devices()[0].device_kind not in EARLIER


def _mesh_size() -> int:
    """The number of devices that XLA divides the traced program over; 1 within `pmap`, which has divided it."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size if not mesh.empty and all(kind == AxisType.Auto for kind in mesh.axis_types) else 1


def _kernel(q: Array, k: Array, v: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas  # for TPUs alone

    heads_first = partial(jnp.swapaxes, axis1=1, axis2=2)
    sizes = pallas.BlockSizes(**block_sizes(q.shape[1], k.shape[1], q.shape[-1]))
    out = pallas.flash_attention(*map(heads_first, (q, k, v)), sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes)
    return heads_first(out)


def block_sizes(queries: int, keys: int, head_size: int) -> dict[str, int]:
    """How many positions the kernels take at a time, of `queries` and `keys` positions, multiples of 128.

    The major blocks are the largest that fit the vector memory of all chips, as the other operands are read again for
    each.
    """
    wide = max(1, head_size // LANES)
    q, k, k_dq = _divisor(queries, 512), _divisor(keys, 512), _divisor(keys, 256)
    forward = {"block_b": 1, "block_q": q, "block_k_major": _divisor(keys, 4096 // wide, k), "block_k": k}
    of_keys = {"block_k_major_dkv": _divisor(keys, 2048 // wide, k), "block_k_dkv": k}
    of_keys |= {"block_q_major_dkv": q, "block_q_dkv": q}
    of_queries = {"block_q_dq": _divisor(queries, 1024 // wide), "block_k_major_dq": k_dq, "block_k_dq": k_dq}
    return forward | of_keys | of_queries


def _divisor(length: int, most: int, unit: int = LANES) -> int:
    """The largest divisor of `length` that is a multiple of `unit`, itself a divisor, and at most `most`, or `unit`."""
    return next((size for size in range(most - most % unit, unit, -unit) if length % size == 0), unit)
