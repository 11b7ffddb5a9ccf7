"""Tensors that stay in their file until they are asked for, and are then laid out in memory as they are computed with.

What a CPU computes with are the arrays themselves, if they are contiguous and begin where XLA wants them to; any others
it copies, and a model is in memory twice.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT = 64  # bytes, of what XLA takes as it is


class Stored(NamedTuple):
    """A tensor in a file; `np.asarray` reads it."""

    view: Callable[[], np.ndarray]  # the tensor as the file has it, to be looked at and dropped
    dtype: DTypeLike = None  # what floats are cast to; None keeps theirs

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own, for which it is looked up."""
        return self.view().shape

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> np.ndarray:
        view = self.view()
        return np.array(view, dtype or self._dtype(view.dtype))

    def then(self, change: Callable[[np.ndarray], np.ndarray]) -> "Stored":
        """The tensor that `change` makes of this one, without reading it."""
        return self._replace(view=lambda: change(self.view()))

    def laid_out(self) -> np.ndarray:
        """The tensor in contiguous, aligned, read-only memory; cast and copied at once, without a copy between."""
        view = self.view()
        array = _aligned(view.shape, self._dtype(view.dtype))
        np.copyto(array, view, casting="unsafe")
        array.flags.writeable = False  # JAX takes an array that it shares for one that never changes
        return array

    def _dtype(self, stored: np.dtype) -> np.dtype:
        """Integers keep theirs."""
        return stored if self.dtype is None or not jnp.issubdtype(stored, jnp.floating) else np.dtype(self.dtype)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
