"""What experiments measure on trained models: pictures drawn by them, and the cards of these."""

from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.frame import Lab
from ldm_jax import samplers
from ldm_jax.data.datasets import load_dataset
from ldm_jax.evaluation.cards import evaluate_images, evaluate_reconstructions
from ldm_jax.evaluation.features import lpips_distance, vgg16_features
from ldm_jax.generate import request
from ldm_jax.trained import Trained
from ldm_jax.training.parallel import replicate
from ldm_jax.xla import cache_folder

BATCH = 250
SMOKE_REFERENCE = 100  # test images that a smoke run compares with, instead of all
READERS, NEIGHBOURS = 2_000, 5  # training pictures that read what is drawn, and how many of them vote
RECONSTRUCTED = 2_000  # test images that an autoencoder is to give back


def draw(model: Trained, num: int, *, seed: int = 0, guidance: float = 1.0, **table: Any) -> np.ndarray:
    """`num` pictures uint8 [N, H, W, C], the same number of each class; `table` is of `samplers.build_table`."""
    batch = min(BATCH, num)
    generator = samplers.build_generator(model.config, len(model.class_names), batch)
    wanted = request(num, list(range(len(model.class_names))), guidance=guidance, seed=seed)
    batches = generator.images(replicate(model.params), wanted, samplers.build_table(model.config, **table))
    return np.concatenate(list(tqdm(batches, total=-(-num // batch), desc="    drawing", leave=False)))


def reference(lab: Lab, size: int = 28) -> np.ndarray:
    """The test images, uint8 [N, size, size, 1]."""
    images = load_dataset("fashion_mnist", "test", data_dir=lab.data_dir, image_size=size).arrays["x"]
    return images[:SMOKE_REFERENCE] if lab.budget == "smoke" else images


def cards(lab: Lab, images: np.ndarray, size: int = 28) -> dict[str, dict[str, Any]]:
    """FD, KID, precision and recall of pictures against the test images, each with what one must know to compare it."""
    return evaluate_images(images, reference(lab, size), **_in_vgg16())


def reconstruction_cards(originals: np.ndarray, given_back: np.ndarray) -> dict[str, dict[str, Any]]:
    """FD, PSNR, SSIM and LPIPS of what an autoencoder gives back of test images."""
    return evaluate_reconstructions(originals, given_back, lpips=lpips_distance(batch_size=BATCH), **_in_vgg16())


def _in_vgg16() -> dict[str, Any]:
    return {"extractor": vgg16_features(resize=32, batch_size=BATCH), "cache": cache_folder() / "features"}


def share_read_as(lab: Lab, images: np.ndarray, labels: np.ndarray) -> list[float]:
    """Of each class the share of its pictures that is read as it: by the vote of the nearest training pictures.

    As many as NEIGHBOURS of READERS training pictures vote, by the distance in VGG16's features.
    """
    known = load_dataset("fashion_mnist", f"train[:{READERS}]", data_dir=lab.data_dir).arrays
    extractor = _in_vgg16()["extractor"]
    theirs, ours = extractor(known["x"]), extractor(images)
    square = (ours**2).sum(1)[:, None] - 2 * ours @ theirs.T + (theirs**2).sum(1)
    votes = known["label"][np.argpartition(square, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]]
    read = np.array([np.bincount(vote).argmax() for vote in votes])
    return [float((read[labels == label] == label).mean()) for label in np.unique(labels)]
