"""What CLIP finds: scores of embeddings as float64 NumPy. All embeddings here have the length 1.

Where several candidates are equally near, a score is its expected value over their orders: a network that says the same
of everything scores as guessing does, not 0 or 1.
"""

import math
from collections.abc import Sequence

import numpy as np


def recall_at(similarity: np.ndarray, true: np.ndarray, k: int) -> float:
    """The share of queries with at least one true candidate among the k nearest.

    Args:
      similarity: [N, M] of N queries to M candidates.
      true: [N, M] bool, which candidates are true; at least one of each query.
      k: 1 to M.

    Raises:
      ValueError: for arguments that do not fit.
    """
    if similarity.shape != true.shape or similarity.ndim != 2 or true.dtype != bool:
        given = f"{list(similarity.shape)} and {true.dtype} {list(true.shape)}"
        raise ValueError(f"similarity and true must both be [N, M], the second bool; got {given}")
    if not 1 <= k <= true.shape[1]:
        raise ValueError(f"k must be in 1 to {true.shape[1]}, the number of candidates; got {k}")
    if not true.any(1).all():
        raise ValueError(f"query {np.argmin(true.any(1))} has no true candidate")
    best = np.where(true, similarity, -np.inf).max(1, keepdims=True)
    nearer, tied = (similarity > best).sum(1), similarity == best
    return float(np.mean([_found(k - n, e, r) for n, e, r in zip(nearer, tied.sum(1), (tied & true).sum(1))]))


def _found(places: int, tied: int, true: int) -> float:
    """The probability that `places` of `tied` candidates, drawn at random, hold at least one of the `true` ones."""
    if places <= 0:
        return 0.0
    return 1 - math.comb(tied - true, min(places, tied)) / math.comb(tied, min(places, tied))


def retrieval(
    text: np.ndarray, image: np.ndarray, true: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall of pictures by texts and of texts by pictures (Radford et al. 2021, section 3.1).

    Args:
      text, image: embeddings [N, D] and [M, D].
      true: [N, M] bool, whether the text is true of the picture; at least once in each row and column.
      ks: those above the number of candidates are left out.

    Returns:
      {"text_to_image_recall@1", ..., "image_to_text_recall@1", ...}.
    """
    similarity = _cosines(text, image)
    ways = {"text_to_image": (similarity, true), "image_to_text": (similarity.T, true.T)}
    return {
        f"{way}_recall@{k}": recall_at(*arrays, k)
        for way, arrays in ways.items()
        for k in ks
        if k <= arrays[1].shape[1]
    }


def class_embeddings(prompts: np.ndarray) -> np.ndarray:
    """The embedding of each class, [C, D]: the mean of its K prompts' [C, K, D], brought back to length 1.

    Radford et al. 2021, section 3.1.4: the ensemble of prompt templates is taken over embeddings, not probabilities.
    """
    mean = prompts.astype(np.float64).mean(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def zero_shot_accuracy(image: np.ndarray, classes: np.ndarray, label: np.ndarray) -> float:
    """The share of pictures [N, D] to which, of the classes [C, D], their own is nearest; label [N] int in [0, C)."""
    if label.min() < 0 or label.max() >= len(classes):
        raise ValueError(f"labels must be in 0 to {len(classes) - 1}; got {label.min()} to {label.max()}")
    return recall_at(_cosines(image, classes), label[:, None] == np.arange(len(classes)), 1)


def r_precision(image: np.ndarray, prompts: np.ndarray, own: np.ndarray) -> float:
    """The share of drawn pictures [N, D] to which, of all prompts [P, D], the one they were drawn from is nearest.

    R-precision with R = 1 (Xu et al. 2018, "AttnGAN", section 4), by CLIP's embeddings (Park et al. 2021). `own` [N] is
    the number of each picture's prompt; the prompts should differ from each other.
    """
    return zero_shot_accuracy(image, prompts, own)


def clip_score(text: np.ndarray, image: np.ndarray) -> float:
    """Mean of max(0, 100 cos) of pairs, text and image [N, D]; in [0, 100].

    Hessel et al. 2021, "CLIPScore", section 3, with the factor 100 that is usual for drawn pictures in place of 2.5.
    Each CLIP has its own: only scores by the same one can be compared.
    """
    if text.shape != image.shape or text.ndim != 2:
        raise ValueError(f"text and image must both be [N, D]; got {list(text.shape)} and {list(image.shape)}")
    cosines = (text.astype(np.float64) * image).sum(1)
    return float(np.maximum(0.0, 100 * cosines).mean())


def _cosines(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    return queries.astype(np.float64) @ candidates.astype(np.float64).T
