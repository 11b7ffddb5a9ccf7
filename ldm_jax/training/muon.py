"""Muon (Jordan 2024): kernels are updated by their momentum, with its singular values made about equal.

optax.contrib.muon is the same by the plain Newton-Schulz iteration. On the Gram matrices of all kernels at once it
takes a quarter of the time.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of X <- (a + b X X^T + c (X X^T)^2) X (Jordan 2024)
ITERATIONS = 5
UPDATE_RMS = 0.2  # root mean square of a kernel's update, per learning rate: about AdamW's (Liu 2025, section 2.2)
# The first and last layers, whose kernels AdamW updates: of UNet and autoencoder, DiT, CLIP, classifier.
ENDS = (
    *("conv_in", "conv_out", "pos_embed", "proj_out_2"),
    *("patch_embedding", "text_projection", "visual_projection", "head"),
)
EPS = 1e-8


class MuonState(NamedTuple):
    """The momentum of the kernels."""

    momentum: Any


def muon(rate: optax.Schedule, *, b1: float, b2: float, weight_decay: float) -> optax.GradientTransformation:
    """The optimizer: Muon for the kernels of all layers but the first and the last, AdamW for all other parameters.

    Both have Nesterov momentum, the learning rate `rate` and decoupled weight decay; `b1` and `b2` are AdamW's.
    """
    hidden = (scale_by_muon(), optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(rate))
    others = optax.adamw(rate, b1=b1, b2=b2, eps=EPS, weight_decay=weight_decay, nesterov=True)
    return optax.partition({"muon": optax.chain(*hidden), "adamw": others}, _labels)


def _labels(params: Any) -> Any:
    """The optimizer of each parameter: "muon" or "adamw"."""

    def label(path: tuple, leaf: Array) -> str:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        hidden = names[-1:] == ["kernel"] and leaf.ndim >= 2 and not any(name in ENDS for name in names)
        return "muon" if hidden else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def scale_by_muon() -> optax.GradientTransformation:
    """Gradients of kernels [..., C, D] -> their Nesterov momentum, orthogonalized, of root mean square UPDATE_RMS.

    A kernel is a matrix of D columns: all axes but the last are of inputs.
    """

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, state.momentum, grads)
        leaves, treedef = jax.tree.flatten(jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, grads))
        matrices = orthogonalize([leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves])
        scaled = (UPDATE_RMS * max(matrix.shape) ** 0.5 * matrix for matrix in matrices)
        updates = [matrix.reshape(leaf.shape) for matrix, leaf in zip(scaled, leaves)]
        return jax.tree.unflatten(treedef, updates), MuonState(momentum)

    return optax.GradientTransformation(lambda params: MuonState(optax.tree.zeros_like(params)), update)


def orthogonalize(matrices: Sequence[Array]) -> list[Array]:
    """Matrices [M, N] float32 with the same singular vectors and singular values near 1, between 0.7 and 1.2.

    With X = U S V^T, every iterate is X Q, where Q is a polynomial of the Gram matrix G = X^T X: five iterations take
    products of G's size only. Matrices of one smaller side are iterated together.
    """
    tall = [matrix.T if matrix.shape[0] < matrix.shape[1] else matrix for matrix in matrices]
    tall = [matrix / (jnp.linalg.norm(matrix) + EPS) for matrix in tall]  # so that no singular value is above 1
    of_side, result = defaultdict(list), list(matrices)
    for index, matrix in enumerate(tall):
        of_side[matrix.shape[1]].append(index)
    for indices in of_side.values():
        gram = jnp.stack([_product(tall[index].T, tall[index]) for index in indices])
        for index, factor in zip(indices, _newton_schulz(gram)):
            flat = _product(tall[index], factor)
            result[index] = flat.T if flat.shape != matrices[index].shape else flat
    return result


def _newton_schulz(gram: Array) -> Array:
    """Gram matrices [K, N, N] of eigenvalues in [0, 1] -> the factors Q [K, N, N] of `orthogonalize`."""
    a, b, c = COEFFICIENTS
    identity = jnp.eye(gram.shape[-1])
    factor = jnp.broadcast_to(identity, gram.shape)
    for _ in range(ITERATIONS):
        polynomial = a * identity + b * gram + c * _product(gram, gram)
        factor = _product(factor, polynomial)
        gram = _product(polynomial, _product(gram, polynomial))  # of the next iterate; all factors commute
    return factor


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
