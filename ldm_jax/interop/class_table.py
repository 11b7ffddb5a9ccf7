"""What a UNet is told of classes, as a part of it in diffusers: `encoder_hid_proj`, a linear map of one-hot vectors.

Of K classes and none, with L tokens each, it maps [B, L, (K + 1) L] to context [B, L, D]: it looks up the rows of an
embedding. So diffusers' own class holds all that was learned.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop.stored import Stored

PROJECTION = "encoder_hid_proj"
NO_FIELDS = {"encoder_hid_dim": None, "encoder_hid_dim_type": None}  # of a UNet without it


def fields_of(rows: int) -> dict[str, Any]:
    """The fields of a UNet's config.json that tell of (K + 1) L rows."""
    return {"encoder_hid_dim": rows, "encoder_hid_dim_type": "text_proj"}


def projection_of(table: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """An embedding [K + 1, L D] as the weights of such a map, D = `width`."""
    weight = table.reshape(-1, width).T
    return {f"{PROJECTION}.weight": weight, f"{PROJECTION}.bias": np.zeros(width, table.dtype)}


def split_table(
    state: Mapping[str, np.ndarray | Stored], rows: int, width: int
) -> tuple[dict[str, np.ndarray | Stored], np.ndarray]:
    """The inverse: a UNet's state dict without the map; the rows [(K + 1) L, D].

    Raises:
      InputError: if there is no map of that shape in it.
    """
    weight, bias = (np.asarray(state.get(f"{PROJECTION}.{name}", ())) for name in ("weight", "bias"))
    if (weight.shape, bias.shape) != ((width, rows), (width,)):
        raise InputError(f"the weights have no {PROJECTION} of {(width, rows)}")
    table = np.ascontiguousarray(weight.T) + bias if bias.any() else np.ascontiguousarray(weight.T)
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{PROJECTION}.")}, table
