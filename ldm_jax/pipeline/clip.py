"""The CLIP of a run: its text encoder conditions a text-to-image model, both encoders score and guide samples.

The run folder's clip/ has its checkpoints, and in tokenizer/ the files of its vocabulary.
"""

from collections.abc import Callable
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
    """Both encoders, their EMA parameters {"text", "image", "logit_scale"}, and the tokenizer of the captions."""

    clip: CLIP
    params: dict[str, Any]
    tokenizer: Tokenizer


def load_clip(path: Path, config: ConfigDict | None = None) -> TrainedCLIP:
    """The CLIP of a run folder; `config` None: the folder's. Raises InputError if there is none, or it does not fit."""
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


def clip_of(config: ConfigDict, tokenizer: Tokenizer | None = None) -> CLIP:
    """Both encoders of a config, for a tokenizer; None: for the largest vocabulary that it may have."""
    vocab_size, max_length, end = config.clip.vocab_size, config.clip.max_length, config.clip.vocab_size - 1
    if tokenizer is not None:
        vocab_size, max_length, end = tokenizer.vocab_size, tokenizer.max_length, tokenizer.end
    return build_clip(config, vocab_size=vocab_size, max_length=max_length, eos_token_id=end)


def text_conditioning(trained: TrainedCLIP) -> tuple[TextConditioning, list[dict[str, Any]]]:
    """The conditioning on texts by a CLIP's text encoder (its features of each token), and its parameters."""
    encoder = trained.clip.text.clone(projection_dim=None)
    params = {name: tree for name, tree in trained.params["text"].items() if name != "text_projection"}
    return TextConditioning((encoder,), (trained.tokenizer,), False), [params]


def embed_texts(trained: TrainedCLIP, texts: list[str], batch_size: int) -> np.ndarray:
    """CLIP embeddings of texts, float32 [N, D] of length 1."""
    return _embed(trained, lambda clip, ids: clip.embed_text(ids), trained.tokenizer(texts).ids, batch_size)


def embed_images(trained: TrainedCLIP, images: np.ndarray, batch_size: int) -> np.ndarray:
    """CLIP embeddings of images uint8 [N, H, W, C], float32 [N, D] of length 1."""
    return _embed(trained, lambda clip, images: clip.embed_image(to_pixels(images)), images, batch_size)


def _embed(trained: TrainedCLIP, method: Callable, inputs: np.ndarray, batch_size: int) -> np.ndarray:
    embed = parallel_map(lambda params, batch: trained.clip.apply({"params": params}, batch, method=method))
    return map_in_batches(embed, replicate(trained.params), inputs, batch_size)
