"""Tiled encoding and decoding of large images with the memory of one tile.

Tiles, their overlap and blending are those of AutoencoderKL.enable_tiling in diffusers 0.42.1. The result is close to
that of the whole image but not the same: norms and attention cover one tile.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

PARTS = 4  # neighbouring tiles overlap by this fraction of a side


def in_tiles(function: Callable[[Array], Array], x: Array, tile: int, result: int) -> Array:
    """`function`, which maps a side of `tile` to one of `result`, applied to x [B, h, w, c] in tiles from the top left.

    Tiles at the right and the bottom may be smaller, so that the function is compiled for up to four shapes.
    """
    if max(x.shape[1:3]) <= tile:
        return function(x)
    step, fade = tile - tile // PARTS, result // PARTS
    rows, columns = (range(0, side, step) for side in x.shape[1:3])
    pieces = _map_by_shape(function, {(i, j): x[:, i : i + tile, j : j + tile] for i in rows for j in columns})
    lines = []
    for i in rows:
        for j in columns:
            if i:
                pieces[i, j] = _faded(pieces[i - step, j], pieces[i, j], fade, axis=1)
            if j:
                pieces[i, j] = _faded(pieces[i, j - step], pieces[i, j], fade, axis=2)
        kept = [pieces[i, j][:, : result - fade, : result - fade] for j in columns]
        lines.append(jnp.concatenate(kept, axis=2))
    return jnp.concatenate(lines, axis=1)


def _map_by_shape(function: Callable[[Array], Array], pieces: dict[Any, Array]) -> dict[Any, Array]:
    """The function applied to each piece, one after the other."""
    places: dict[tuple[int, ...], list] = {}
    for place, piece in pieces.items():
        places.setdefault(piece.shape, []).append(place)
    done = {}
    for alike in places.values():
        results = jax.lax.map(function, jnp.stack([pieces[place] for place in alike]))
        done |= {place: results[k] for k, place in enumerate(alike)}
    return done


def _faded(before: Array, piece: Array, fade: int, axis: int) -> Array:
    """The piece with its first `fade` rows (or columns) blended with the last ones of the piece before."""
    n = min(fade, before.shape[axis], piece.shape[axis])
    weight = jnp.expand_dims(jnp.arange(n) / n, [a for a in range(piece.ndim) if a != axis])
    last = jax.lax.slice_in_dim(before, before.shape[axis] - n, before.shape[axis], axis=axis)
    first, rest = jnp.split(piece, [n], axis=axis)
    return jnp.concatenate([last * (1 - weight) + first * weight, rest], axis=axis)
