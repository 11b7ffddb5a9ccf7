"""Lazy tensors: read from their file when needed, straight into memory that XLA uses without a copy.

On a CPU, XLA computes on the arrays themselves if they are contiguous and aligned; it copies any others, so that a
model would be in memory twice.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT = 64  # bytes; XLA uses such an array in place


class Stored(NamedTuple):
    """A tensor in a file; `np.asarray` reads it."""

    view: Callable[[], np.ndarray]  # the tensor as the file has it, not to be kept
    dtype: DTypeLike = None  # what floats are cast to; None keeps theirs

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, from the file."""
        return self.view().shape

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> np.ndarray:
        view = self.view()
        return np.array(view, dtype or self._cast(view.dtype))

    def then(self, change: Callable[[np.ndarray], np.ndarray]) -> "Stored":
        """The tensor `change` makes of this one, without reading it."""
        return self._replace(view=lambda: change(self.view()))

    def laid_out(self) -> np.ndarray:
        """The tensor, any shape, in contiguous, aligned, read-only memory; cast and copied in one pass."""
        view = self.view()
        dtype = self._cast(view.dtype)
        size = math.prod(view.shape) * dtype.itemsize
        memory = np.empty(size + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        array = memory[start : start + size].view(dtype).reshape(view.shape)
        np.copyto(array, view, casting="unsafe")
        array.flags.writeable = False  # JAX assumes that an array it shares never changes
        return array

    def _cast(self, stored: np.dtype) -> np.dtype:
        """`dtype` for floats; integers keep theirs."""
        return stored if self.dtype is None or not jnp.issubdtype(stored, jnp.floating) else np.dtype(self.dtype)
