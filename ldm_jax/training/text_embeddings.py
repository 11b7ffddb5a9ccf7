"""What a model is told of the texts of a data set: computed once, and kept, unless its text encoders learn along."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.errors import InputError
from ldm_jax.models.conditioning import make_tau
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline.model import Pretrained
from ldm_jax.pipeline.trainable import NO_CAPTIONS, Captions, reads_along
from ldm_jax.run_folder.checkpoint import flatten, unflatten
from ldm_jax.runtime.files import atomic, content_hash
from ldm_jax.runtime.parallel import map_in_batches, parallel_map, replicate


def numbered(captions: Sequence[Sequence[str]]) -> Captions:
    """The captions of P classes, one or more each; of none, NO_CAPTIONS."""
    if not captions:
        return NO_CAPTIONS
    texts = tuple(dict.fromkeys(text for group in captions for text in group))
    row_of, most = {text: row for row, text in enumerate(texts)}, max(map(len, captions))
    rows = [[row_of[group[k % len(group)]] for k in range(most)] for group in captions]
    return Captions(texts, np.array(rows, np.int32))


def _rows(config: ConfigDict, model: Pretrained, texts: Sequence[str]) -> tuple[dict[str, Any], int]:
    """What the text encoders take of each text and, in the last row, of nothing; how many of them are too long."""
    return model.texts(texts, None, pipeline_from_config.picture_size(config), 0)


def check_texts(config: ConfigDict, model: Pretrained, params: Any, texts: Sequence[str]) -> None:
    """Raises InputError if what the model is told of all texts takes more than `config.data.memory_limit_gb`."""
    one, _ = _rows(config, model, texts[:1])
    told = jax.eval_shape(make_tau(model.encoders), params, one)
    size = 4 * sum(leaf.size / 2 for leaf in jax.tree.leaves(told)) * (len(texts) + 1) / 2**30
    if size > config.data.memory_limit_gb:
        raise InputError(
            f"what the model is told of {len(texts):,} captions takes {size:.1f} GB, more than "
            f"config.data.memory_limit_gb = {config.data.memory_limit_gb}"
        )


def tell_of(config: ConfigDict, model: Pretrained, params: Any, texts: Sequence[str], cache: Path) -> dict[str, Any]:
    """What the UNet is told of each text, and in the last row of nothing: trees of [P + 1, ...], float32.

    It is computed unless the folder `cache` has it already, for these texts and these encoders, whose parameters are
    `params`. Where they learn along it is what they take of each text.
    """
    rows, cut = _rows(config, model, texts)
    if cut:
        print(f"     {cut} of the {len(texts)} captions are longer than the model reads; their ends are left out")
    if reads_along(config, model):
        return rows
    tau = make_tau(model.encoders)
    like = jax.eval_shape(tau, params, rows)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), like)
    path = cache / f"{content_hash({'params': params, 'texts': rows}, config.dtype)}.texts.npz"
    if not path.exists():
        mapped = parallel_map(lambda params, batch: tau(params, batch["texts"]))
        told = map_in_batches(mapped, replicate(params), {"texts": rows}, config.evaluation.batch_size)
        flat = {name: values.astype(np.float32) for name, values in flatten(told).items()}
        with atomic(path) as temporary:
            np.savez(temporary, **flat)
    with np.load(path) as arrays:
        return unflatten(dict(arrays), like, where=str(path))
