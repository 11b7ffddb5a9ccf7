"""CLIP's tokenizer and captions from a config and a data set."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError
from ldm_jax.interop.bpe import train_bpe
from ldm_jax.interop.tokenizer import CONFIG, Tokenizer, load_tokenizer, tokenizer_of_vocabulary
from ldm_jax.pipeline.clip import PAD, TrainedCLIP, load_clip
from ldm_jax.training.contrastive import caption_arrays


def make_tokenizer(config: ConfigDict, folder: Path, train_set: Dataset) -> Tokenizer:
    """The tokenizer in `folder`; made there if it is not yet, of `config.clip.tokenizer` or the split's own captions.

    Raises:
      InputError: the vocabulary is damaged, or too small.
    """
    clip = config.clip
    if not (folder / CONFIG).exists():  # which is written last
        if clip.tokenizer:
            tokenizer = tokenizer_of_vocabulary(Path(clip.tokenizer), pad_token=PAD, max_length=clip.max_length)
            save_tokenizer(tokenizer, folder)
        else:
            texts = [text for number in train_set.present for text in train_set.captions[number]]
            train_bpe(texts, clip.vocab_size, folder, clip.max_length)
    return load_tokenizer(folder)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer's files to a folder, unless they are there; what a killed run left is removed."""
    if not (folder / CONFIG).exists():
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save(folder)


def caption_ids(tokenizer: Tokenizer, captions: tuple[tuple[str, ...], ...]) -> np.ndarray:
    """Token ids of the captions of P classes, K at most, int32 [P, K, L]; where there are fewer they are repeated."""
    most = max(map(len, captions))
    texts = [group[k % len(group)] for group in captions for k in range(most)]
    return tokenizer(texts).ids.reshape(len(captions), most, -1)


def frozen_texts(tokenizer: Tokenizer, dataset: Dataset) -> dict[str, Any]:
    """The stage's `frozen` arrays: the captions' token ids; prints how many captions are truncated."""
    truncated = int(tokenizer([text for group in dataset.captions for text in group]).cut.sum())
    if truncated:
        print(f"     {truncated} captions have more than config.clip.max_length tokens; their ends are left out")
    return {"texts": caption_arrays(caption_ids(tokenizer, dataset.captions))}


def check(config: ConfigDict) -> None:
    """Raises InputError, before anything is written, for a CLIP or a vocabulary that is missing or does not fit."""
    if config.clip.checkpoint:
        reused(config)
    elif config.clip.tokenizer:
        tokenizer_of_vocabulary(Path(config.clip.tokenizer), pad_token=PAD, max_length=config.clip.max_length)


def reused(config: ConfigDict) -> TrainedCLIP:
    """The CLIP of `config.clip.checkpoint`; raises InputError if it does not fit the config."""
    trained = load_clip(Path(config.clip.checkpoint))
    width, size, wanted = trained.clip.text.hidden_size, trained.clip.image.image_size, config.clip
    if (width, size) != (wanted.text_width, config.data.image_size):
        raise InputError(
            f"config.clip.checkpoint={wanted.checkpoint} has a text encoder of width {width} and images of {size} "
            f"pixels; they must be config.clip.text_width = {wanted.text_width} and config.data.image_size = "
            f"{config.data.image_size}"
        )
    return trained
