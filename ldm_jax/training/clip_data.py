"""CLIP's tokenizer, captions and training stage from a config."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError
from ldm_jax.interop.bpe import train_bpe
from ldm_jax.interop.tokenizer import CONFIG, Tokenizer, load_tokenizer, tokenizer_of_vocabulary
from ldm_jax.models.clip_vision import CLIP
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline.clip import PAD, TrainedCLIP, clip_for, load
from ldm_jax.training import from_config as training_from_config
from ldm_jax.training.clip import CLIPStage
from ldm_jax.training.contrastive import caption_arrays


def make_tokenizer(config: ConfigDict, folder: Path, train_set: Dataset) -> Tokenizer:
    """The tokenizer in `folder`; made there if it is not yet, of `config.clip.tokenizer` or the split's own captions.

    Raises:
      InputError: the vocabulary is damaged, or too small a one is asked for.
    """
    clip = config.clip
    if not (folder / CONFIG).exists():  # which is written last
        if clip.tokenizer:
            keep(tokenizer_of_vocabulary(Path(clip.tokenizer), pad_token=PAD, max_length=clip.max_length), folder)
        else:
            texts = [text for number in train_set.present for text in train_set.captions[number]]
            train_bpe(texts, clip.vocab_size, folder, clip.max_length)
    return load_tokenizer(folder)


def keep(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer's files to a folder, unless they are there; what is left of a run that was killed goes."""
    if not (folder / CONFIG).exists():
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save(folder)


def caption_ids(tokenizer: Tokenizer, captions: tuple[tuple[str, ...], ...]) -> np.ndarray:
    """Captions of P classes, K at most, as int32 [P, K, L]; where there are fewer they come again and again."""
    most = max(map(len, captions))
    texts = [group[k % len(group)] for group in captions for k in range(most)]
    return tokenizer(texts).ids.reshape(len(captions), most, -1)


def frozen_texts(tokenizer: Tokenizer, dataset: Dataset) -> dict[str, Any]:
    """What the stage's steps need of the captions; says how many do not fit."""
    cut = int(tokenizer([text for group in dataset.captions for text in group]).cut.sum())
    if cut:
        print(f"     {cut} captions have more than config.clip.max_length tokens; their ends are left out")
    return {"texts": caption_arrays(caption_ids(tokenizer, dataset.captions))}


def build(config: ConfigDict, tokenizer: Tokenizer) -> tuple[CLIP, CLIPStage]:
    """Both encoders for a tokenizer, and the stage that trains them."""
    clip = clip_for(config, tokenizer)
    return clip, training_from_config.build_clip_stage(config, clip)


def on_paper(config: ConfigDict) -> CLIPStage:
    """The stage of a config whose tokenizer is not there yet: as large as it may be."""
    fields = config.clip
    sizes = {"vocab_size": fields.vocab_size, "max_length": fields.max_length}
    return training_from_config.build_clip_stage(
        config, pipeline_from_config.build_clip(config, **sizes, eos_token_id=fields.vocab_size - 1)
    )


def check(config: ConfigDict) -> None:
    """Raises InputError, before anything is written, for a CLIP or a vocabulary that is not there or does not fit."""
    if config.clip.checkpoint:
        adopted(config)
    elif config.clip.tokenizer:
        tokenizer_of_vocabulary(Path(config.clip.tokenizer), pad_token=PAD, max_length=config.clip.max_length)


def adopted(config: ConfigDict) -> TrainedCLIP:
    """The CLIP of `config.clip.checkpoint`; raises InputError if it does not fit the config."""
    found = load(Path(config.clip.checkpoint))
    shape, wanted = found.clip.text, config.clip
    if (shape.hidden_size, found.clip.image.image_size) != (wanted.text_width, config.data.image_size):
        raise InputError(
            f"config.clip.checkpoint={wanted.checkpoint} is of texts {shape.hidden_size} wide and pictures of "
            f"{found.clip.image.image_size} pixels; they must be config.clip.text_width = {wanted.text_width} and "
            f"config.data.image_size = {config.data.image_size}"
        )
    return found
