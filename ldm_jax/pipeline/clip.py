"""CLIP as a part of a run: its tokenizer, its training, its scores, and how it is read back.

It lies in the run folder's clip/: checkpoints, and in tokenizer/ CLIP's files of the vocabulary.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.errors import InputError
from ldm_jax.interop.tokenizer import Tokenizer, load_tokenizer
from ldm_jax.models.clip_vision import CLIP
from ldm_jax.models.pixels import to_pixels
from ldm_jax.pipeline.from_config import build_clip
from ldm_jax.run_folder import checkpoint
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.runtime.parallel import map_in_batches, parallel_map, replicate

FOLDER, TOKENIZER = "clip", "tokenizer"
PAD = "<|endoftext|>"
FIELDS = ("seed", "dtype", "data", "clip")  # what its checkpoints depend on


class TrainedCLIP(NamedTuple):
    """Both encoders, their averaged parameters {"text", "image", "logit_scale"}, and what makes tokens of texts."""

    clip: CLIP
    params: dict[str, Any]
    tokenizer: Tokenizer


def load(path: Path, config: ConfigDict | None = None) -> TrainedCLIP:
    """Reads the CLIP of a run folder, whose config is `config` (None: that which it has).

    Raises:
      InputError: there is none, or it does not fit its own config.
    """
    if config is None:
        if not path.is_dir():
            raise InputError(f"{path} does not exist; it must be a run folder with a CLIP")
        config = config_io.of_run(path / "config.json")
    if "clip" not in config.stages:
        raise InputError(f"{path} has no CLIP: its config.stages are {', '.join(config.stages)}")
    tokenizer = load_tokenizer(path / FOLDER / TOKENIZER)
    clip = clip_for(config, tokenizer)
    image = clip.image
    x = jax.ShapeDtypeStruct((1, image.image_size, image.image_size, image.num_channels), np.float32)
    ids = jax.ShapeDtypeStruct((1, clip.text.max_position_embeddings), np.int32)
    like = jax.eval_shape(clip.init, jax.random.key(0), ids, x)["params"]
    return TrainedCLIP(clip, checkpoint.averaged(load_latest(path / FOLDER), like, path / FOLDER), tokenizer)


def clip_for(config: ConfigDict, tokenizer: Tokenizer) -> CLIP:
    """Both encoders for a tokenizer."""
    sizes = {"vocab_size": tokenizer.vocab_size, "max_length": tokenizer.max_length}
    return build_clip(config, **sizes, eos_token_id=tokenizer.end)


def embed_texts(found: TrainedCLIP, texts: list[str], batch_size: int) -> np.ndarray:
    """Embeddings of texts, [N, D] of length 1."""

    def embed(params: Any, batch: dict[str, Any]) -> jax.Array:
        return found.clip.apply({"params": params}, batch["ids"], method="embed_text")

    batch = {"ids": found.tokenizer(texts).ids}
    return map_in_batches(parallel_map(embed), replicate(found.params), batch, batch_size)


def embed_images(found: TrainedCLIP, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Embeddings of pictures uint8 [N, H, W, C], [N, D] of length 1."""

    def embed(params: Any, batch: dict[str, Any]) -> jax.Array:
        return found.clip.apply({"params": params}, to_pixels(batch["x"]), method="embed_image")

    return map_in_batches(parallel_map(embed), replicate(found.params), {"x": images}, batch_size)
