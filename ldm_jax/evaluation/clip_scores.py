"""Score cards of a CLIP, and of images by a CLIP."""

from dataclasses import asdict

import numpy as np

from ldm_jax.data.datasets import Dataset
from ldm_jax.evaluation.cards import Card
from ldm_jax.evaluation.features import fingerprint
from ldm_jax.evaluation.retrieval import class_embeddings, clip_score, r_precision, retrieval, zero_shot_accuracy
from ldm_jax.pipeline.clip import TrainedCLIP, embed_images, embed_texts


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
