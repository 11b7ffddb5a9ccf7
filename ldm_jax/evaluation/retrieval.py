"""Retrieval, zero-shot accuracy and CLIPScore of CLIP embeddings of length 1, as float64 NumPy.

Where several candidates are equally near, a score is its expected value over their orders: a network of constant
output scores as guessing does, not 0 or 1.
"""

import math
from collections.abc import Sequence

import numpy as np


def recall_at(similarity: np.ndarray, true: np.ndarray, k: int) -> float:
    """Recall@k: the fraction of N queries with at least one true candidate, of M, among the k nearest.

    Args:
      similarity: [N, M] of queries and candidates.
      true: [N, M] bool, the true candidates; at least one for each query, else ValueError.
      k: 1 to M, else ValueError.
    """
    if similarity.shape != true.shape or similarity.ndim != 2 or true.dtype != bool:
        shapes = f"{list(similarity.shape)} and {true.dtype} {list(true.shape)}"
        raise ValueError(f"similarity and true must both be [N, M], the second bool; got {shapes}")
    if not 1 <= k <= true.shape[1]:
        raise ValueError(f"k must be in 1 to {true.shape[1]}, the number of candidates; got {k}")
    if not true.any(1).all():
        raise ValueError(f"query {np.argmin(true.any(1))} has no true candidate")
    best = np.where(true, similarity, -np.inf).max(1, keepdims=True)
    nearer, tied = (similarity > best).sum(1), similarity == best
    return float(np.mean([_hit(k - n, e, r) for n, e, r in zip(nearer, tied.sum(1), (tied & true).sum(1))]))


def _hit(places: int, tied: int, true: int) -> float:
    """The probability that a random choice of `places` of `tied` candidates has at least one of the `true` ones."""
    if places <= 0:
        return 0.0
    return 1 - math.comb(tied - true, min(places, tied)) / math.comb(tied, min(places, tied))


def retrieval(
    text: np.ndarray, image: np.ndarray, true: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k of images by texts and of texts by images (Radford et al. 2021, section 3.1).

    Returns {"text_to_image_recall@1": ..., "image_to_text_recall@1": ...} for embeddings text [N, D] and image [M, D],
    where `true` [N, M] bool marks the texts of each image. A k above the number of candidates is left out.
    """
    cosines = _cosines(text, image)
    recalls = {f"text_to_image_recall@{k}": recall_at(cosines, true, k) for k in ks if k <= len(image)}
    return recalls | {f"image_to_text_recall@{k}": recall_at(cosines.T, true.T, k) for k in ks if k <= len(text)}


def class_embeddings(prompts: np.ndarray) -> np.ndarray:
    """The embeddings of classes, [C, D]: the normalized mean over each class's prompts [C, K, D].

    Radford et al. 2021, section 3.1.4: the ensemble of prompt templates is taken over embeddings, not probabilities.
    """
    mean = prompts.astype(np.float64).mean(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def zero_shot_accuracy(image: np.ndarray, classes: np.ndarray, label: np.ndarray) -> float:
    """The fraction of images [N, D] whose nearest class [C, D] is their label [N], int in [0, C), else ValueError."""
    if label.min() < 0 or label.max() >= len(classes):
        raise ValueError(f"labels must be in 0 to {len(classes) - 1}; got {label.min()} to {label.max()}")
    return recall_at(_cosines(image, classes), label[:, None] == np.arange(len(classes)), 1)


def r_precision(image: np.ndarray, prompts: np.ndarray, own: np.ndarray) -> float:
    """R-precision: the fraction of samples [N, D] whose nearest prompt [P, D] is their own, at the index `own` [N].

    With R = 1 (Xu et al. 2018, "AttnGAN", section 4), by CLIP's embeddings (Park et al. 2021), for distinct prompts.
    """
    return zero_shot_accuracy(image, prompts, own)


def clip_score(text: np.ndarray, image: np.ndarray) -> float:
    """CLIPScore: the mean of max(0, 100 cos) of pairs, text and image [N, D]; in [0, 100], ValueError for other shapes.

    Hessel et al. 2021, section 3, with the factor 100 that is usual for samples in place of 2.5. Only scores by the
    same CLIP can be compared.
    """
    if text.shape != image.shape or text.ndim != 2:
        raise ValueError(f"text and image must both be [N, D]; got {list(text.shape)} and {list(image.shape)}")
    cosines = (text.astype(np.float64) * image).sum(1)
    return float(np.maximum(0.0, 100 * cosines).mean())


def _cosines(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    return queries.astype(np.float64) @ candidates.astype(np.float64).T
