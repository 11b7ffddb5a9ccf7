"""A run's own CLIP: its text encoder conditions a text-to-image model, both encoders score and guide.

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
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.models.pixels import to_pixels
from ldm_jax.pipeline.from_config import build_clip
from ldm_jax.run_folder.checkpoint import ema_params, load_latest
from ldm_jax.runtime.parallel import map_in_batches, parallel_map, replicate

FOLDER, TOKENIZER = "clip", "tokenizer"
PAD = "<|endoftext|>"


class TrainedCLIP(NamedTuple):
    """Both encoders, their averaged parameters {"text", "image", "logit_scale"}, and the tokenizer of the captions."""

    clip: CLIP
    params: dict[str, Any]
    tokenizer: Tokenizer


def load_clip(path: Path, config: ConfigDict | None = None) -> TrainedCLIP:
    """Reads the CLIP of a run folder, whose config is `config` (None: that in the folder).

    Raises:
      InputError: there is none, or it does not fit its own config.
    """
    if config is None:
        if not path.is_dir():
            raise InputError(f"{path} does not exist; it must be a run folder with a CLIP")
        config = config_io.read_with_defaults(path / "config.json")
    if "clip" not in config.stages:
        raise InputError(f"{path} has no CLIP: its config.stages are {', '.join(config.stages)}")
    tokenizer = load_tokenizer(path / FOLDER / TOKENIZER)
    clip = clip_of(config, tokenizer)
    size = clip.image.image_size
    x = jax.ShapeDtypeStruct((1, size, size, clip.image.num_channels), np.float32)
    ids = jax.ShapeDtypeStruct((1, clip.text.max_position_embeddings), np.int32)
    like = jax.eval_shape(clip.init, jax.random.key(0), ids, x)["params"]
    return TrainedCLIP(clip, ema_params(load_latest(path / FOLDER), like, path / FOLDER), tokenizer)


def clip_of(config: ConfigDict, tokenizer: Tokenizer) -> CLIP:
    """Both encoders of a config for a tokenizer."""
    sizes = {"vocab_size": tokenizer.vocab_size, "max_length": tokenizer.max_length}
    return build_clip(config, **sizes, eos_token_id=tokenizer.end)


def clip_on_paper(config: ConfigDict) -> CLIP:
    """Both encoders of a config whose tokenizer is not there yet: with the largest vocabulary that it may have."""
    vocab_size, max_length = config.clip.vocab_size, config.clip.max_length
    return build_clip(config, vocab_size=vocab_size, max_length=max_length, eos_token_id=vocab_size - 1)


def text_conditioning(trained: TrainedCLIP) -> tuple[TextConditioning, list[dict[str, Any]]]:
    """The conditioning on texts by a CLIP's text encoder, and its parameters: the features of each token."""
    encoder = trained.clip.text.clone(projection_dim=None)
    params = {name: tree for name, tree in trained.params["text"].items() if name != "text_projection"}
    return TextConditioning((encoder,), (trained.tokenizer,), False), [params]


def embed_texts(trained: TrainedCLIP, texts: list[str], batch_size: int) -> np.ndarray:
    """Embeddings of texts, [N, D] of length 1."""

    def embed(params: Any, batch: dict[str, Any]) -> jax.Array:
        return trained.clip.apply({"params": params}, batch["ids"], method="embed_text")

    batch = {"ids": trained.tokenizer(texts).ids}
    return map_in_batches(parallel_map(embed), replicate(trained.params), batch, batch_size)


def embed_images(trained: TrainedCLIP, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Embeddings of images uint8 [N, H, W, C], [N, D] of length 1."""

    def embed(params: Any, batch: dict[str, Any]) -> jax.Array:
        return trained.clip.apply({"params": params}, to_pixels(batch["x"]), method="embed_image")

    return map_in_batches(parallel_map(embed), replicate(trained.params), {"x": images}, batch_size)
