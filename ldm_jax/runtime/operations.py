"""Counts of a traced program's operations and of what it saves for the backward pass, from its jaxpr.

XLA's own count leaves out the iterations of loops and, on TPUs, halves convolutions.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxprs_in_params

BACKWARD = "transpose("  # in the name stack of the operations of a backward pass


def count_flops(jaxpr: Jaxpr) -> int:
    """The floating-point operations of matrix products and convolutions, over all devices; a multiply-add is two.

    A loop counts with its length, a kernel with its grid, a loop of unknown length once; of a conditional counts the
    branch that has most.
    """
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def saved_bytes(jaxpr: Jaxpr) -> int:
    """The bytes of the activations: what a forward pass computes and its backward pass reads, over all devices.

    XLA saves less of it where it computes elementwise operations again. Of a gradient in a loop, as with gradient
    accumulation, it is that of one iteration; with gradient checkpointing that of the largest block is added.
    """
    forward: dict[Var, int] = {}
    saved: dict[Var, int] = {}
    within = [0]
    for eqn in jaxpr.eqns:
        within.append(_devices(eqn) * max((saved_bytes(inner) for inner in _inner(eqn)), default=0))
        if BACKWARD not in str(eqn.source_info.name_stack):
            forward |= {var: math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in eqn.outvars}
            continue
        saved |= {var: forward[var] for var in eqn.invars if isinstance(var, Var) and var in forward}
    return sum(saved.values()) + max(within)


def _flops(eqn: JaxprEqn) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec  # out, in, spatial axes
        products = math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel[axis] for axis in spec[1:])
        zeros = math.prod(eqn.params["lhs_dilation"])  # of an input that is dilated by zeros 1 of this many counts
        return 2 * products // zeros // eqn.params["batch_group_count"]
    counts = [count_flops(inner) for inner in _inner(eqn)]
    if name == "cond":
        return max(counts, default=0)
    return sum(counts) * _devices(eqn) * _repeats(eqn)


def _repeats(eqn: JaxprEqn) -> int:
    """How often an equation computes its jaxprs, as far as it says it: a loop, or a kernel over its grid."""
    name, params = eqn.primitive.name, eqn.params
    return (
        params["length"] if name == "scan" else math.prod(params["grid_mapping"].grid) if name == "pallas_call" else 1
    )


def _inner(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs that an equation calls."""
    for inner in jaxprs_in_params(eqn.params):
        yield inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner


def _devices(eqn: JaxprEqn) -> int:
    """How many devices each compute an equation's jaxprs, whose shapes are of one device's part."""
    mesh: Any = eqn.params.get("mesh") if eqn.primitive.name == "shard_map" else None
    return mesh.size if mesh is not None else 1
