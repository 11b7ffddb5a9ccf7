"""CLIP as a part of a run: its tokenizer, its training, its scores, and how it is read back.

It lies in the run folder's clip/: checkpoints, and in tokenizer/ CLIP's files of the vocabulary.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import clip_builders, configuration, run_parts
from ldm_jax.data.datasets import Dataset
from ldm_jax.data.pixels import to_pixels
from ldm_jax.errors import InputError
from ldm_jax.evaluation.cards import Card
from ldm_jax.evaluation.features import fingerprint
from ldm_jax.evaluation.retrieval import class_embeddings, clip_score, r_precision, retrieval, zero_shot_accuracy
from ldm_jax.interop.bpe import train_bpe
from ldm_jax.interop.tokenizer import CONFIG, Tokenizer, load_tokenizer, tokenizer_of_vocabulary
from ldm_jax.models.clip_vision import CLIP
from ldm_jax.training.checkpoint import load_latest
from ldm_jax.training.clip import CLIPStage
from ldm_jax.training.contrastive import caption_arrays
from ldm_jax.training.parallel import map_in_batches, parallel_map, replicate

FOLDER, TOKENIZER = "clip", "tokenizer"
PAD = "<|endoftext|>"
FIELDS = ("seed", "dtype", "data", "clip")  # what its checkpoints depend on


class TrainedCLIP(NamedTuple):
    """Both encoders, their averaged parameters {"text", "image", "logit_scale"}, and what makes tokens of texts."""

    clip: CLIP
    params: dict[str, Any]
    tokenizer: Tokenizer


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
    sizes = {"vocab_size": tokenizer.vocab_size, "max_length": tokenizer.max_length}
    clip = clip_builders.build_clip(config, **sizes, eos_token_id=tokenizer.end)
    return clip, clip_builders.build_clip_stage(config, clip)


def on_paper(config: ConfigDict) -> CLIPStage:
    """The stage of a config whose tokenizer is not there yet: as large as it may be."""
    fields = config.clip
    sizes = {"vocab_size": fields.vocab_size, "max_length": fields.max_length}
    return clip_builders.build_clip_stage(
        config, clip_builders.build_clip(config, **sizes, eos_token_id=fields.vocab_size - 1)
    )


def load(path: Path, config: ConfigDict | None = None) -> TrainedCLIP:
    """Reads the CLIP of a run folder, whose config is `config` (None: that which it has).

    Raises:
      InputError: there is none, or it does not fit its own config.
    """
    if config is None:
        if not path.is_dir():
            raise InputError(f"{path} does not exist; it must be a run folder with a CLIP")
        config = configuration.of_run(path / "config.json")
    if "clip" not in config.stages:
        raise InputError(f"{path} has no CLIP: its config.stages are {', '.join(config.stages)}")
    tokenizer = load_tokenizer(path / FOLDER / TOKENIZER)
    clip, stage = build(config, tokenizer)
    like = jax.eval_shape(stage.init, jax.random.key(0)).ema_params
    return TrainedCLIP(clip, run_parts.averaged(load_latest(path / FOLDER), like, path / FOLDER), tokenizer)


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


def score(found: TrainedCLIP, test_set: Dataset, classes: Dataset | None, batch_size: int) -> dict[str, dict]:
    """The cards of a CLIP: retrieval among the pictures of a split by the first caption of each, and zero-shot accuracy
    of the same pictures' `classes`, if there are such."""
    held_out = test_set[np.arange(len(test_set))]
    image = embed_images(found, held_out["x"], batch_size)
    numbers = np.unique(held_out["label"])
    text = embed_texts(found, [test_set.class_names[number] for number in numbers], batch_size)
    about = {
        "better": "higher",
        "n": len(test_set),
        "reference": test_set.split,
        "reference_n": len(numbers),
        "reference_sha256": fingerprint(held_out["x"]),
    }
    cards = {
        name: asdict(Card(score=name.replace("_", " "), value=value, method=_way(name, len(numbers)), **about))
        for name, value in retrieval(text, image, numbers[:, None] == held_out["label"]).items()
    }
    if classes is None:
        return cards
    prompts = embed_texts(found, list(classes.class_names), batch_size)[:, None]
    label = classes[np.arange(len(classes))]["label"]
    accuracy = zero_shot_accuracy(image, class_embeddings(prompts), label)
    method = f"share of pictures to whose embedding that of their own class's name, of {len(prompts)}, is nearest"
    cards["zero_shot"] = asdict(Card(score="zero-shot accuracy", value=accuracy, method=method, **about))
    return cards


def fit(
    found: TrainedCLIP, images: np.ndarray, prompts: list[str], real: np.ndarray, split: str, batch_size: int
) -> dict[str, dict]:
    """The cards of N pictures with the prompts that they were drawn by; `real` are those that the prompts are told of.

    The floor is what the real ones score, the most that this CLIP lets one hope for.
    """
    distinct = sorted(set(prompts))
    own = np.array([distinct.index(prompt) for prompt in prompts])
    texts = embed_texts(found, distinct, batch_size)
    drawn, theirs = (embed_images(found, some, batch_size) for some in (images, real))
    about = {
        "better": "higher",
        "n": len(images),
        "reference": split,
        "reference_n": len(distinct),
        "reference_sha256": fingerprint(real),
        "floor_n": len(real),
    }
    words = {
        "clip_score": "mean of max(0, 100 cos) of picture and prompt, by the run's own CLIP",
        "r_precision": f"share of pictures whose own prompt is nearest of {len(distinct)}, by the run's own CLIP",
    }
    score_of = {
        "clip_score": lambda image: clip_score(texts[own], image),
        "r_precision": lambda image: r_precision(image, texts, own),
    }
    return {
        f"{name}_{split}": asdict(
            Card(score=name.replace("_", " "), value=score_of[name](drawn), floor=score_of[name](theirs),
                 method=words[name], **about)
        )
        for name in words
    }  # fmt: skip


def _way(name: str, texts: int) -> str:
    what, k = name.split("_recall@")
    sought, given = ("pictures", "caption") if what == "text_to_image" else ("captions", "picture")
    return f"share of {given}s whose own {sought[:-1]} is among the {k} nearest of all {sought} ({texts} captions)"


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
