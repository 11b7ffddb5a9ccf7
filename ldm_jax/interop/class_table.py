"""Class embeddings stored in a diffusers UNet: as `encoder_hid_proj`, a linear map of one-hot vectors.

For K classes and the null condition with L tokens each, it maps one-hot vectors [B, L, (K + 1) L] to the context
[B, L, D]: a lookup of the embedding's rows, so that diffusers' own UNet2DConditionModel holds all trained weights.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop.stored import Stored

PROJECTION = "encoder_hid_proj"
NO_FIELDS = {"encoder_hid_dim": None, "encoder_hid_dim_type": None}  # of a UNet without it


def config_fields(rows: int) -> dict[str, Any]:
    """The fields of the UNet's config.json for `rows` = (K + 1) L one-hot dimensions."""
    return {"encoder_hid_dim": rows, "encoder_hid_dim_type": "text_proj"}


def projection_weights(table: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """The state dict of the linear map for an embedding [K + 1, L D], D = `width`."""
    weight = table.reshape(-1, width).T
    return {f"{PROJECTION}.weight": weight, f"{PROJECTION}.bias": np.zeros(width, table.dtype)}


def split_table(
    state: Mapping[str, np.ndarray | Stored], rows: int, width: int
) -> tuple[dict[str, np.ndarray | Stored], np.ndarray]:
    """The UNet's state dict without the linear map; the embedding's rows [(K + 1) L, D]; InputError without such."""
    weight, bias = (np.asarray(state.get(f"{PROJECTION}.{name}", ())) for name in ("weight", "bias"))
    if (weight.shape, bias.shape) != ((width, rows), (width,)):
        raise InputError(f"the weights have no {PROJECTION} of shape {(width, rows)}, the class embedding")
    table = np.ascontiguousarray(weight.T) + bias if bias.any() else np.ascontiguousarray(weight.T)
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{PROJECTION}.")}, table
