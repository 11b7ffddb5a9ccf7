"""The text embeddings of a data set's captions, computed once and cached unless the text encoders are trained too."""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.errors import InputError
from ldm_jax.models.conditioning import EncodedConditioning, TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.trainable import Trainable
from ldm_jax.run_folder.checkpoint import flatten, unflatten
from ldm_jax.runtime.files import atomic, content_hash
from ldm_jax.runtime.parallel import map_in_batches, parallel_map, replicate


def index_captions(captions: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], np.ndarray]:
    """The unique captions of P classes with one or more each, and their indices by class, int32 [P, k].

    A class with fewer than k captions repeats them.
    """
    texts = tuple(dict.fromkeys(text for group in captions for text in group))
    row_of, most = {text: row for row, text in enumerate(texts)}, max(map(len, captions))
    rows = [[row_of[group[k % len(group)]] for k in range(most)] for group in captions]
    return texts, np.array(rows, np.int32)


def freeze(
    model: LatentDiffusion,
    params: Params,
    trainable: Trainable,
    captions: Sequence[Sequence[str]],
    config: ConfigDict,
    cache: Path,
) -> tuple[LatentDiffusion, Params]:
    """The model that is trained, and the `frozen` arrays of its stage (see `diffusion.DiffusionStage`).

    A frozen text encoder is applied to all captions here, and removed from the model.

    Args:
      model, params: the initial model.
      trainable: its trained parameters.
      captions: of each class of the data set; () without captions.
      config: see `embed`.
      cache: the folder of the text embeddings.
    """
    frozen, conditioning = trainable.frozen(params), model.conditioning
    if not isinstance(conditioning, TextConditioning):
        return model, frozen | {"table": conditioning.table()}
    texts, rows = index_captions(captions)
    table, truncated = conditioning.table(texts, None, model.image_shape[:2])
    if truncated:
        print(f"     {truncated} of the {len(texts)} captions are longer than the text encoder's context "
              "and are truncated", flush=True)  # fmt: skip
    if not trainable.trains("conditioning"):
        table = embed(model, frozen["conditioning"], table, config, cache)
        frozen = {name: tree for name, tree in frozen.items() if name != "conditioning"}
        model = replace(model, conditioning=EncodedConditioning())
    several = {"captions": rows} if rows.shape[1] > 1 else {}
    return model, frozen | {"table": table} | several


def check_memory(model: LatentDiffusion, params: Params, captions: Sequence[Sequence[str]], config: ConfigDict) -> None:
    """Raises InputError if the text embeddings of all captions take more than `config.data.memory_limit_gb`."""
    if not isinstance(model.conditioning, TextConditioning):
        return
    texts, _ = index_captions(captions)
    one, _ = model.conditioning.table(texts[:1], None, model.image_shape[:2])
    encoded = jax.eval_shape(model.conditioning.encode, params["conditioning"], one)
    size = 4 * sum(leaf.size / 2 for leaf in jax.tree.leaves(encoded)) * (len(texts) + 1) / 2**30
    if size > config.data.memory_limit_gb:
        raise InputError(
            f"the text embeddings of {len(texts):,} captions take {size:.1f} GB, more than "
            f"config.data.memory_limit_gb = {config.data.memory_limit_gb}"
        )


def embed(model: LatentDiffusion, params: Any, table: Any, config: ConfigDict, cache: Path) -> dict[str, Any]:
    """The text embeddings of a table of token ids, float32 [P + 1, ...], from the cache if it has them.

    Args:
      model: with a text conditioning.
      params: of its text encoders.
      table: the inputs of the encoders, [P + 1, ...].
      config: `dtype`, a part of the cache's key, and `evaluation.batch_size`, the texts per batch.
      cache: a folder.
    """
    encode, float32 = model.conditioning.encode, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32)
    like = jax.tree.map(float32, jax.eval_shape(encode, params, table))
    path = cache / f"{content_hash({'params': params, 'texts': table}, config.dtype)}.texts.npz"
    cached = _read(path, like)
    if cached is None:
        encoded = map_in_batches(parallel_map(encode), replicate(params), table, config.evaluation.batch_size)
        flat = {name: values.astype(np.float32) for name, values in flatten(encoded).items()}
        with atomic(path, jax.process_index()) as temporary:
            np.savez(temporary, **flat)
        cached = _read(path, like)
    return cached


def _read(path: Path, like: Any) -> Any | None:
    """The cached text embeddings in the structure of `like`; None if there are none, or damaged ones."""
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            return unflatten(dict(arrays), like, where=str(path))
    except (ValueError, EOFError, OSError, BadZipFile, zlib.error, InputError) as error:
        print(f"     cached text embeddings are damaged and computed anew ({error})", flush=True)
        return None
