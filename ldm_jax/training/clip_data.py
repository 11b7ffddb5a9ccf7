"""The tokenizer and the captions of a run's CLIP, and the CLIP that a run reuses."""

import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.config.io import flatten, read_with_defaults
from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError
from ldm_jax.interop.bpe import train_bpe
from ldm_jax.interop.tokenizer import CONFIG, Tokenizer, load_tokenizer, tokenizer_of_vocabulary
from ldm_jax.pipeline.clip import PAD, TrainedCLIP, load_clip
from ldm_jax.training.contrastive import caption_arrays

# The config fields of CLIP's encoders but those of the tokenizer.
OF_ENCODERS = (
    "data.image_size", "data.channels", "clip.projection_dim", "clip.patch_size",
    *(f"clip.{encoder}_{size}" for encoder in ("text", "image") for size in ("width", "layers", "heads")),
)  # fmt: skip


def make_tokenizer(config: ConfigDict, folder: Path, train_set: Dataset) -> Tokenizer:
    """The tokenizer in `folder`; if there is none, first that of config.clip.tokenizer, or one of the captions.

    Raises InputError if the vocabulary is damaged or too small.
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
    """Writes a tokenizer's files to a folder, unless they are there; incomplete files are removed."""
    if not (folder / CONFIG).exists():
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save(folder)


def frozen_texts(tokenizer: Tokenizer, dataset: Dataset) -> dict[str, Any]:
    """The `frozen` arrays of CLIP's stage: the token ids of the captions; prints how many captions are truncated."""
    captions, most = dataset.captions, max(map(len, dataset.captions))
    truncated = int(tokenizer([text for group in captions for text in group]).truncated.sum())
    if truncated:
        print(f"     {truncated} captions have more than config.clip.max_length tokens and are truncated")
    texts = [group[k % len(group)] for group in captions for k in range(most)]  # fewer than `most` are repeated
    return {"texts": caption_arrays(tokenizer(texts).ids.reshape(len(captions), most, -1))}


def check(config: ConfigDict) -> None:
    """Raises InputError if the reused CLIP or vocabulary of a config is missing or does not fit."""
    if config.clip.checkpoint:
        reused(config)
    elif config.clip.tokenizer:
        tokenizer_of_vocabulary(Path(config.clip.tokenizer), pad_token=PAD, max_length=config.clip.max_length)


def reused(config: ConfigDict) -> TrainedCLIP:
    """The CLIP of `config.clip.checkpoint`; raises InputError if it does not fit the config."""
    path = Path(config.clip.checkpoint)
    trained = load_clip(path)
    fields, others = flatten(config), flatten(read_with_defaults(path / "config.json"))
    for name in OF_ENCODERS:
        if fields[name] != others[name]:
            right = f"for config.clip.checkpoint={path} it must be {others[name]}"
            raise InputError(f"config.{name} is {fields[name]}; {right}")
    return trained
