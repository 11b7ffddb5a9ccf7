"""Textual inversion files (Gal et al. 2022, arXiv:2208.01618): learned vectors of new tokens of the text encoders.

| written by           | tensors                                    | token              |
|----------------------|--------------------------------------------|--------------------|
| diffusers            | `<token>` [D] or [n, D]                    | the tensor's name  |
| AUTOMATIC1111, .pt   | `string_to_param` / `*` [n, D]             | the file's name    |
| .safetensors of UIs  | `emb_params` [n, D]                        | the file's name    |
| of SDXL              | `clip_l` [n, 768] and `clip_g` [n, 1280]   | the file's name    |

`write_embedding` writes the first and, of SDXL, the last, with the token in the file's metadata, where it is looked for
before the file's name.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop.diffusers import check_finite
from ldm_jax.interop.weights import open_weights, read_weights, write_safetensors

FILE = "learned_embeds.safetensors"  # its name in diffusers
UNNAMED = ("emb_params", "*")
TOKEN = "token"  # of the metadata
OF_SDXL = ("clip_l", "clip_g")  # in the order of the text encoders


class Embedding(NamedTuple):
    """A token and its vectors, float32 [n, D], for each text encoder."""

    token: str
    vectors: tuple[np.ndarray, ...]


def read_embedding(path: Path) -> Embedding:
    """The embedding in a file; raises InputError, which names --embedding, if it is damaged or of no known layout."""
    where = f"--embedding={path}"
    if not path.is_file():
        raise InputError(f"{where} does not exist; it must be a textual inversion file, such as learned_embeds.bin")
    tensors, name = read_weights(path), open_weights(path).metadata.get(TOKEN, path.stem)
    if set(tensors) == set(OF_SDXL):
        token, found = name, [tensors[each] for each in OF_SDXL]
    elif len(tensors) == 1:
        ((key, tensor),) = tensors.items()
        token, found = name if key in UNNAMED else key, [tensor]
    else:
        known = "one tensor, or clip_l and clip_g"
        raise InputError(f"{where} has {', '.join(sorted(tensors)[:4])}; a textual inversion file has {known}")
    vectors = tuple(np.atleast_2d(tensor.astype(np.float32)) for tensor in found)
    for vector in vectors:
        check_finite(f"{where}: {token}", vector)
        if vector.ndim != 2 or len(vector) != len(vectors[0]) or not vector.size:
            shapes = " and ".join(str(list(each.shape)) for each in vectors)
            raise InputError(f"{where}: vectors are [n, D], as many for each text encoder; these are {shapes}")
    return Embedding(token, vectors)


def write_embedding(path: Path, embedding: Embedding) -> None:
    """Writes an embedding of one text encoder or of SDXL's two to a .safetensors, which diffusers and others read."""
    token, vectors = embedding
    names = (token,) if len(vectors) == 1 else OF_SDXL
    write_safetensors(path, dict(zip(names, vectors, strict=True)), {TOKEN: token})
