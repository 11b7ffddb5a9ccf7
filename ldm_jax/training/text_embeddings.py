"""The text embeddings of a data set's captions: computed once and cached, unless the text encoders are trained too."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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


class Captions(NamedTuple):
    """The captions of a data set, each once, and which of them belong to each class."""

    texts: tuple[str, ...]
    rows: np.ndarray  # [P, k] int32, indices of `texts`; a class with fewer than k has them again and again


def index_captions(captions: Sequence[Sequence[str]]) -> Captions:
    """The captions of P classes, one or more each."""
    texts = tuple(dict.fromkeys(text for group in captions for text in group))
    row_of, most = {text: row for row, text in enumerate(texts)}, max(map(len, captions))
    rows = [[row_of[group[k % len(group)]] for k in range(most)] for group in captions]
    return Captions(texts, np.array(rows, np.int32))


def freeze(
    model: LatentDiffusion,
    params: Params,
    trainable: Trainable,
    captions: Sequence[Sequence[str]],
    config: ConfigDict,
    cache: Path,
) -> tuple[LatentDiffusion, Params]:
    """The model as it is trained, and the stage's `frozen` arrays (see `diffusion.DiffusionStage`).

    A frozen text encoder is run over all captions before training, and is no part of the model then.

    Args:
      model, params: that training starts from.
      trainable: what of it is trained.
      captions: of each class of the data set; () without captions.
      config: of the run: see `embed`.
      cache: a folder for the text embeddings.
    """
    frozen, conditioning = trainable.frozen(params), model.conditioning
    if not isinstance(conditioning, TextConditioning):
        return model, frozen | {"table": conditioning.table()}
    indexed = index_captions(captions)
    table, truncated = conditioning.table(indexed.texts, None, model.image_shape[:2])
    if truncated:
        print(f"     {truncated} of the {len(indexed.texts)} captions are longer than the text encoder's context; "
              "their ends are left out", flush=True)  # fmt: skip
    if "conditioning" in frozen:
        table = embed(model, frozen["conditioning"], table, config, cache)
        frozen = {name: tree for name, tree in frozen.items() if name != "conditioning"}
        model = replace(model, conditioning=EncodedConditioning())
    several = {"captions": indexed.rows} if indexed.rows.shape[1] > 1 else {}
    return model, frozen | {"table": table} | several


def check_memory(model: LatentDiffusion, params: Params, captions: Sequence[Sequence[str]], config: ConfigDict) -> None:
    """Raises InputError if the text embeddings of all captions take more than `config.data.memory_limit_gb`."""
    if not isinstance(model.conditioning, TextConditioning):
        return
    texts = index_captions(captions).texts
    one, _ = model.conditioning.table(texts[:1], None, model.image_shape[:2])
    encoded = jax.eval_shape(model.conditioning.encode, params["conditioning"], one)
    size = 4 * sum(leaf.size / 2 for leaf in jax.tree.leaves(encoded)) * (len(texts) + 1) / 2**30
    if size > config.data.memory_limit_gb:
        raise InputError(
            f"the text embeddings of {len(texts):,} captions take {size:.1f} GB, more than "
            f"config.data.memory_limit_gb = {config.data.memory_limit_gb}"
        )


def embed(model: LatentDiffusion, params: Any, table: Any, config: ConfigDict, cache: Path) -> dict[str, Any]:
    """The encoded rows of a text conditioning's table, float32 [P + 1, ...], from the cache if they are there already.

    Args:
      model: whose conditioning it is.
      params: of the text encoders.
      table: their inputs, [P + 1, ...].
      config: of the run: its dtype is part of the cache's key, evaluation.batch_size texts are encoded at a time.
      cache: a folder.
    """
    encode = model.conditioning.encode
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), jax.eval_shape(encode, params, table)
    )
    path = cache / f"{content_hash({'params': params, 'texts': table}, config.dtype)}.texts.npz"
    if not path.exists():
        encoded = map_in_batches(parallel_map(encode), replicate(params), table, config.evaluation.batch_size)
        flat = {name: values.astype(np.float32) for name, values in flatten(encoded).items()}
        with atomic(path) as temporary:
            np.savez(temporary, **flat)
    with np.load(path) as arrays:
        return unflatten(dict(arrays), like, where=str(path))
