"""Score cards: every score together with what one must know to compare it with another, for `evaluation.json`.

A Frechet distance depends on the number of images, the reference, the resize and the feature network; a number without
those cannot be reproduced. And it means little alone: beside it stand the floor (what real training images score
against the reference) and what the autoencoder's reconstructions score, which no sampler behind it can beat by much.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.evaluation.features import FeatureExtractor, PerceptualDistance, fingerprint
from ldm_jax.evaluation.metrics import frechet_distance, kernel_distance, precision_recall, psnr, ssim
from ldm_jax.runtime.files import atomic
from ldm_jax.sampling.image_grids import check_images

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
PSNR_CAP = 100.0  # dB that equal images count as, so that the mean stays finite
SSIM_MIN_SIZE = 11


@dataclass(frozen=True, kw_only=True)
class Card:
    """One score; None where a field has no meaning for it.

    Attributes:
        score: its name, such as "FD-VGG16".
        value: the score.
        better: "lower" or "higher".
        n: how many images were scored.
        reference: the split they were compared with.
        reference_n: how many images of it.
        reference_sha256: of those images' bytes.
        method: what was computed, in words.
        resize: the side images were brought to for the network.
        weights_sha256: of the network's weights.
        std: standard deviation of the estimate.
        floor: the same score of `floor_n` real training images.
        autoencoder: the same score of `autoencoder_n` reference images, encoded and decoded.
    """

    score: str
    value: float
    better: str
    n: int
    reference: str
    reference_n: int
    reference_sha256: str
    method: str
    resize: int | None = None
    weights_sha256: str | None = None
    std: float | None = None
    floor: float | None = None
    floor_n: int | None = None
    autoencoder: float | None = None
    autoencoder_n: int | None = None


# What must be equal for two values to be of the same kind.
CONDITIONS = ("score", "n", "reference", "reference_n", "reference_sha256", "method", "resize", "weights_sha256")


def difference(card: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """value - other's value, for two cards of the same kind.

    Raises:
        InputError: the scores are not comparable; it names every condition in which they differ.
    """
    unlike = [f"{key} {card[key]} and {other[key]}" for key in CONDITIONS if card[key] != other[key]]
    if unlike:
        raise InputError(f"these scores cannot be compared, they differ in {'; '.join(unlike)}")
    return card["value"] - other["value"]


def evaluate_images(
    images: np.ndarray,
    reference: np.ndarray,
    *,
    extractor: FeatureExtractor,
    reference_split: str = "test",
    train: np.ndarray | None = None,
    reconstructions: np.ndarray | None = None,
    cache: Path | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Frechet and kernel distance, precision and recall of generated images in one feature space.

    Args:
        images: the generated ones, uint8 [N, H, W, 1 or 3].
        reference: real ones, uint8 [M, H, W, 1 or 3], of the split called `reference_split`.
        extractor: the feature space.
        train: real training images; N of them, drawn by `seed`, give the floor.
        reconstructions: reference images, encoded and decoded, for the autoencoder's own score.
        cache: folder where the features of the real images are kept, under a hash of all they depend on.
        seed: of the kernel distance's subsets and of the draw from `train`.

    Returns:
        Score name -> card, as plain JSON values.

    Raises:
        InputError: arrays of another kind, or fewer than 4 images of one of them.
    """
    check_images(images, "the generated images")
    check_images(reference, "the reference images")
    for name, array in (
        ("generated", images),
        ("reference", reference),
        ("training", train),
        ("decoded", reconstructions),
    ):
        if array is not None and len(array) <= NEIGHBOURS:
            raise InputError(f"scores need at least {NEIGHBOURS + 1} {name} images, got {len(array)}")
    reference_features = _features(extractor, reference, cache)
    values = _feature_scores(extractor(images), reference_features, seed)
    floor, autoencoder, drawn = {}, {}, None
    if train is not None:
        drawn = np.sort(np.random.default_rng(seed).choice(len(train), min(len(images), len(train)), replace=False))
        floor = _feature_scores(_features(extractor, train[drawn], cache), reference_features, seed)
    if reconstructions is not None:
        autoencoder = _feature_scores(extractor(reconstructions), reference_features, seed)

    cards = {}
    subset = min(KID_SUBSET_SIZE, len(images), len(reference))
    for kind, better, method in (
        ("FD", "lower", "Frechet distance"),
        ("KID", "lower", f"kernel distance, mean of {KID_SUBSETS} subsets of {subset}"),
        ("precision", "higher", f"precision, {NEIGHBOURS} neighbours"),
        ("recall", "higher", f"recall, {NEIGHBOURS} neighbours"),
    ):
        card = Card(
            score=score_name(kind, extractor),
            value=values[kind],
            better=better,
            n=len(images),
            reference=reference_split,
            reference_n=len(reference),
            reference_sha256=fingerprint(reference),
            method=f"{method}; {extractor.name}, {extractor.layer}",
            resize=extractor.resize,
            weights_sha256=extractor.weights_sha256,
            std=values["KID std"] if kind == "KID" else None,
            floor=floor.get(kind),
            floor_n=None if drawn is None else len(drawn),
            autoencoder=autoencoder.get(kind),
            autoencoder_n=None if reconstructions is None else len(reconstructions),
        )
        cards[card.score] = asdict(card)
    return cards


def evaluate_reconstructions(
    originals: np.ndarray,
    reconstructions: np.ndarray,
    *,
    extractor: FeatureExtractor,
    lpips: PerceptualDistance | None = None,
    split: str = "test",
    cache: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """How well an autoencoder gives images back: rFD, PSNR, SSIM and LPIPS, the last three as means over images.

    Args:
        originals: uint8 [N, H, W, 1 or 3], of the split called `split`.
        reconstructions: the same images encoded and decoded, of the same shape.
        extractor: the feature space for rFD, the Frechet distance from reconstructions to originals.
        lpips: the perceptual distance; None leaves LPIPS out.
        cache: as in `evaluate_images`.

    Returns:
        Score name -> card. SSIM is left out for images smaller than its 11 x 11 window.
    """
    check_images(originals, "the originals")
    check_images(reconstructions, "the reconstructions")
    if originals.shape != reconstructions.shape or len(originals) < 2:
        given = f"{list(originals.shape)} and {list(reconstructions.shape)}"
        raise InputError(f"originals and reconstructions must be the same 2 or more images, got {given}")
    common = {
        "n": len(originals),
        "reference": split,
        "reference_n": len(originals),
        "reference_sha256": fingerprint(originals),
    }
    rfd = frechet_distance(extractor(reconstructions), _features(extractor, originals, cache))
    cards = [
        Card(
            score=f"r{score_name('FD', extractor)}",
            value=rfd,
            better="lower",
            method=f"Frechet distance; {extractor.name}, {extractor.layer}",
            resize=extractor.resize,
            weights_sha256=extractor.weights_sha256,
            **common,
        ),
        Card(
            score="PSNR",
            value=float(np.minimum(psnr(originals, reconstructions), PSNR_CAP).mean()),
            better="higher",
            method=f"dB, mean over images, at most {PSNR_CAP:g} each",
            **common,
        ),
    ]
    if min(originals.shape[1:3]) >= SSIM_MIN_SIZE:
        value = float(ssim(originals, reconstructions).mean())
        method = "11x11 Gaussian window, sigma 1.5, mean over images"
        cards.append(Card(score="SSIM", value=value, better="higher", method=method, **common))
    if lpips is not None:
        cards.append(
            Card(
                score=lpips.name,
                value=float(lpips(originals, reconstructions).mean(dtype=np.float64)),
                better="lower",
                method="mean over images",
                resize=lpips.resize,
                weights_sha256=lpips.weights_sha256,
                **common,
            )
        )
    return {card.score: asdict(card) for card in cards}


def score_name(kind: str, extractor: FeatureExtractor) -> str:
    """FD-VGG16, KID-VGG16 ...; the names FID and KID alone belong to the Inception network they were defined with."""
    if extractor.name == "Inception":
        return {"FD": "FID", "KID": "KID"}.get(kind, f"{kind}-{extractor.name}")
    return f"{kind}-{extractor.name}"


def _feature_scores(features: np.ndarray, reference: np.ndarray, seed: int) -> dict[str, float]:
    kid, kid_std = kernel_distance(features, reference, subsets=KID_SUBSETS, subset_size=KID_SUBSET_SIZE, seed=seed)
    precision, recall = precision_recall(features, reference, k=NEIGHBOURS)
    fd = frechet_distance(features, reference)
    return {"FD": fd, "KID": kid, "KID std": kid_std, "precision": precision, "recall": recall}


def _features(extractor: FeatureExtractor, images: np.ndarray, cache: Path | None) -> np.ndarray:
    """extractor(images), looked up in `cache` first; a damaged entry is made anew."""
    if cache is None:
        return extractor(images)
    about = f"{fingerprint(images)} {extractor.weights_sha256} {extractor.layer} {extractor.resize}"
    path = Path(cache) / f"features_{hashlib.sha256(about.encode()).hexdigest()[:24]}.npy"
    try:
        features = np.load(path, allow_pickle=False)
        if features.ndim == 2 and len(features) == len(images):
            return features
    except (OSError, ValueError, EOFError):  # absent, cut short, or not an array
        pass
    features = extractor(images)
    with atomic(path) as temporary:
        np.save(temporary, features)
    return features
