"""Score cards of a CLIP on held-out images, and of samples by a CLIP."""

from dataclasses import asdict

import numpy as np

from ldm_jax.data.datasets import Dataset
from ldm_jax.evaluation.cards import Card, Cards
from ldm_jax.evaluation.features import sha256_of_images
from ldm_jax.evaluation.retrieval import class_embeddings, clip_score, r_precision, retrieval, zero_shot_accuracy
from ldm_jax.pipeline.clip import TrainedCLIP, embed_images, embed_texts


def clip_cards(clip: TrainedCLIP, test_set: Dataset, classes: Dataset | None, batch_size: int) -> Cards:
    """The cards of a CLIP: retrieval between the images of a split and the first caption of each, and the zero-shot
    accuracy on the labels of `classes`, the same images, if it is not None."""
    held_out = test_set[np.arange(len(test_set))]
    image = embed_images(clip, held_out["x"], batch_size)
    numbers = np.unique(held_out["label"])
    text = embed_texts(clip, [test_set.class_names[number] for number in numbers], batch_size)
    fields = {"better": "higher", "n": len(test_set), "reference": test_set.split, "reference_n": len(numbers)}
    fields["reference_sha256"] = sha256_of_images(held_out["x"])
    cards = {
        name: asdict(Card(score=name.replace("_", " "), value=value, method=_method(name, len(numbers)), **fields))
        for name, value in retrieval(text, image, numbers[:, None] == held_out["label"]).items()
    }
    if classes is None:
        return cards
    prompts = embed_texts(clip, list(classes.class_names), batch_size)[:, None]
    label = classes[np.arange(len(classes))]["label"]
    accuracy = zero_shot_accuracy(image, class_embeddings(prompts), label)
    method = f"fraction of images whose nearest of {len(prompts)} class names is that of their class"
    cards["zero_shot"] = asdict(Card(score="zero-shot accuracy", value=accuracy, method=method, **fields))
    return cards


def prompt_cards(
    clip: TrainedCLIP, samples: np.ndarray, prompts: list[str], real: np.ndarray, split: str, batch_size: int
) -> Cards:
    """The cards of samples uint8 [N, H, W, C] with their prompts, by a CLIP.

    `real` uint8 [N, H, W, C] are the images of a split whose captions the prompts are. Their score is the floor: the
    best that this CLIP allows.
    """
    distinct = sorted(set(prompts))
    own = np.array([distinct.index(prompt) for prompt in prompts])
    texts = embed_texts(clip, distinct, batch_size)
    embeddings = [embed_images(clip, images, batch_size) for images in (samples, real)]
    fields = {"better": "higher", "n": len(samples), "reference": split, "reference_n": len(distinct)}
    fields |= {"reference_sha256": sha256_of_images(real), "floor_n": len(real)}
    mean = "mean of max(0, 100 cos) of image and prompt, by the run's CLIP"
    nearest = f"fraction of images whose prompt is the nearest of {len(distinct)}, by the run's CLIP"
    scores = {
        "clip_score": (mean, lambda image: clip_score(texts[own], image)),
        "r_precision": (nearest, lambda image: r_precision(image, texts, own)),
    }
    cards = {}
    for name, (method, score_of) in scores.items():
        value, floor = map(score_of, embeddings)
        card = Card(score=name.replace("_", " "), value=value, floor=floor, method=method, **fields)
        cards[f"{name}_{split}"] = asdict(card)
    return cards


def _method(name: str, num_captions: int) -> str:
    direction, k = name.split("_recall@")
    query, target = ("caption", "image") if direction == "text_to_image" else ("image", "caption")
    return f"fraction of {query}s with their {target} among the {k} nearest {target}s ({num_captions} captions)"
