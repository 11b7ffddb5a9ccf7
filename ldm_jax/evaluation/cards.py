"""Score cards, the entries of `evaluation.json`: each score with all that it depends on.

A Fréchet distance depends on the number of images, the reference images, the resize and the feature network, and means
little by itself: a card adds the floor (the score of real training images) and the score of the autoencoder's
reconstructions, which the samples of a latent model can hardly surpass.
"""

import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.evaluation.features import FeatureExtractor, PerceptualDistance, sha256_of_images
from ldm_jax.evaluation.metrics import frechet_distance, kernel_distance, precision_recall, psnr, ssim
from ldm_jax.runtime.files import atomic
from ldm_jax.sampling.image_grids import check_images

Cards = dict[str, dict[str, Any]]  # name of a score -> its card as plain JSON values

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
PSNR_CAP = 100.0  # dB of equal images, which keeps the mean finite
SSIM_MIN_SIZE = 11


@dataclass(frozen=True, kw_only=True)
class Card:
    """One score and its conditions; None where a field does not apply."""

    score: str  # its name, such as "FD-VGG16"
    value: float
    better: str  # "lower" or "higher"
    n: int  # number of scored images
    reference: str  # split of the images compared with
    reference_n: int  # their number
    reference_sha256: str  # of their bytes
    method: str  # the computation, in words
    resize: int | None = None  # side of the feature network's input
    weights_sha256: str | None = None  # of the feature network
    std: float | None = None  # standard deviation of the estimate
    floor: float | None = None  # the score of `floor_n` real training images
    floor_n: int | None = None
    autoencoder: float | None = None  # the score of `autoencoder_n` reference images, encoded and decoded
    autoencoder_n: int | None = None


def reference_fields(split: str, images: np.ndarray) -> dict[str, Any]:
    """The fields of a card on its reference images uint8 [N, H, W, C]."""
    return {"reference": split, "reference_n": len(images), "reference_sha256": sha256_of_images(images)}


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
) -> Cards:
    """Fréchet and kernel distance, precision and recall of generated images in one feature space.

    Args:
        images: generated, uint8 [N, H, W, 1 or 3].
        reference: real, uint8 [M, H, W, 1 or 3].
        extractor: the feature space.
        reference_split: the split of `reference`.
        train: real training images; a random choice of N of them gives the floor.
        reconstructions: reference images, encoded and decoded, for the autoencoder's score.
        cache: folder for the features of real images, by a hash of all they depend on.
        seed: of the kernel distance's subsets and of the choice from `train`.

    Raises:
        InputError: other arrays, or fewer than 4 images in one of them.
    """
    check_images(images, "the generated images")
    check_images(reference, "the reference images")
    arrays = {"generated": images, "reference": reference, "training": train, "decoded": reconstructions}
    for name, array in arrays.items():
        if array is not None and len(array) <= NEIGHBOURS:
            raise InputError(f"scores need at least {NEIGHBOURS + 1} {name} images, got {len(array)}")
    common = {"n": len(images)} | reference_fields(reference_split, reference)
    reference_features = _features(extractor, reference, cache)
    features = extractor(images)
    if min(len(images), len(reference)) <= features.shape[1]:
        counts = f"{len(images)} samples and {len(reference)} real images for {features.shape[1]} features"
        print(f"warning: {counts}: a covariance is singular, and the Fréchet distance too large", file=sys.stderr)
    values = _feature_scores(features, reference_features, seed)
    floor, autoencoder = {}, {}
    if train is not None:
        chosen = np.sort(np.random.default_rng(seed).choice(len(train), min(len(images), len(train)), replace=False))
        floor = _feature_scores(_features(extractor, train[chosen], cache), reference_features, seed)
        common["floor_n"] = len(chosen)
    if reconstructions is not None:
        autoencoder = _feature_scores(extractor(reconstructions), reference_features, seed)
        common["autoencoder_n"] = len(reconstructions)

    subset = min(KID_SUBSET_SIZE, len(images), len(reference))
    cards = {}
    for name, better, method in (
        ("FD", "lower", "Frechet distance"),
        ("KID", "lower", f"kernel distance, mean of {KID_SUBSETS} subsets of {subset}"),
        ("precision", "higher", f"precision, {NEIGHBOURS} neighbours"),
        ("recall", "higher", f"recall, {NEIGHBOURS} neighbours"),
    ):
        scores = {"value": values[name], "floor": floor.get(name), "autoencoder": autoencoder.get(name)}
        scores["std"] = values["KID std"] if name == "KID" else None
        card = Card(score=_name(name, extractor), better=better, **scores, **_method(method, extractor), **common)
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
) -> Cards:
    """The reconstruction scores of an autoencoder: rFD, and as means over images PSNR, SSIM (from 11 x 11) and LPIPS.

    Args:
        originals: uint8 [N, H, W, 1 or 3].
        reconstructions: the same images encoded and decoded, of the same shape.
        extractor: the feature space of rFD, the Fréchet distance from reconstructions to originals.
        lpips: the perceptual distance; None leaves LPIPS out.
        split: of the originals.
        cache: see `evaluate_images`.
    """
    check_images(originals, "the originals")
    check_images(reconstructions, "the reconstructions")
    if originals.shape != reconstructions.shape or len(originals) < 2:
        shapes = f"{list(originals.shape)} and {list(reconstructions.shape)}"
        raise InputError(f"originals and reconstructions must be the same 2 or more images, got {shapes}")
    common = {"n": len(originals)} | reference_fields(split, originals)
    rfd = frechet_distance(extractor(reconstructions), _features(extractor, originals, cache))
    decibels = float(np.minimum(psnr(originals, reconstructions), PSNR_CAP).mean())
    scores = {
        f"r{_name('FD', extractor)}": (rfd, "lower", _method("Frechet distance", extractor)),
        "PSNR": (decibels, "higher", {"method": f"dB, mean over images, at most {PSNR_CAP:g} each"}),
    }
    if min(originals.shape[1:3]) >= SSIM_MIN_SIZE:
        method = {"method": "11x11 Gaussian window, sigma 1.5, mean over images"}
        scores["SSIM"] = float(ssim(originals, reconstructions).mean()), "higher", method
    if lpips is not None:
        method = {"method": "mean over images", "resize": lpips.resize, "weights_sha256": lpips.weights_sha256}
        scores[lpips.name] = float(lpips(originals, reconstructions).mean(dtype=np.float64)), "lower", method
    return {
        score: asdict(Card(score=score, value=value, better=better, **method, **common))
        for score, (value, better, method) in scores.items()
    }


def _name(name: str, extractor: FeatureExtractor) -> str:
    """FD-VGG16, KID-VGG16 ...; the names FID and KID alone are those of the Inception features they are defined on."""
    inception_names = {"FD": "FID", "KID": "KID"} if extractor.name == "Inception" else {}
    return inception_names.get(name, f"{name}-{extractor.name}")


def _method(method: str, extractor: FeatureExtractor) -> dict[str, Any]:
    """The fields of a card on the method and its feature network."""
    network = {"resize": extractor.resize, "weights_sha256": extractor.weights_sha256}
    return {"method": f"{method}; {extractor.name}, {extractor.layer}"} | network


def _feature_scores(features: np.ndarray, reference: np.ndarray, seed: int) -> dict[str, float]:
    kid, kid_std = kernel_distance(features, reference, subsets=KID_SUBSETS, subset_size=KID_SUBSET_SIZE, seed=seed)
    precision, recall = precision_recall(features, reference, k=NEIGHBOURS)
    fd = frechet_distance(features, reference)
    return {"FD": fd, "KID": kid, "KID std": kid_std, "precision": precision, "recall": recall}


def _features(extractor: FeatureExtractor, images: np.ndarray, cache: Path | None) -> np.ndarray:
    """extractor(images), read from `cache` if they are there; a damaged entry is computed again."""
    if cache is None:
        return extractor(images)
    depends_on = f"{sha256_of_images(images)} {extractor.weights_sha256} {extractor.layer} {extractor.resize}"
    path = Path(cache) / f"features_{hashlib.sha256(depends_on.encode()).hexdigest()[:24]}.npy"
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
