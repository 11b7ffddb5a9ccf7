"""What experiments measure on trained models: pictures drawn by them, and the cards of these."""

from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.frame import Lab
from experiments.judge.classifier import judge
from experiments.judge.run import load_judge
from ldm_jax import samplers
from ldm_jax.data.datasets import load_dataset
from ldm_jax.evaluation.cards import evaluate_images, evaluate_reconstructions
from ldm_jax.evaluation.features import lpips_distance, vgg16_features
from ldm_jax.generate import request
from ldm_jax.guides import NO_GUIDES, Guides
from ldm_jax.trained import Trained
from ldm_jax.training.parallel import replicate
from ldm_jax.xla import cache_folder

BATCH = 250
SMOKE_REFERENCE = 100  # test images that a smoke run compares with, instead of all
JUDGE_EPOCHS = {"smoke": 1, "cpu": 2, "gpu": 4}  # of the classifier that reads what is drawn
VARIED = 1_000  # test images whose variety is compared with
RECONSTRUCTED = 2_000  # test images that an autoencoder is to give back


def drawing(model: Trained, num: int, guides: Guides = NO_GUIDES) -> Callable[..., np.ndarray]:
    """draw(seed, guidance, interval, classifier_scale, **table) -> `num` pictures uint8 [N, H, W, C], the same number
    of each class.

    The arguments are as in `generate.Request`, `table` those of `samplers.build_table`. It compiles when first called.
    """
    batch, labels = min(BATCH, num), list(range(len(model.class_names)))
    generator = samplers.build_generator(model.config, len(labels), batch, guides)
    params = replicate(model.params | guides.params)

    def draw(
        *,
        seed: int = 0,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        classifier_scale: float = 0.0,
        **table: Any,
    ) -> np.ndarray:
        wanted = request(num, labels, guidance=guidance, seed=seed, interval=interval)
        if guides.classifier:
            wanted = wanted._replace(classifier_scale=np.full(num, classifier_scale, np.float32))
        batches = generator.images(params, wanted, samplers.build_table(model.config, **table))
        return np.concatenate(list(tqdm(batches, total=-(-num // batch), desc="    drawing", leave=False)))

    return draw


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
    """Of each class the share of its pictures that the judge of experiments/judge reads as it."""
    known = load_dataset("fashion_mnist", lab.config({}).data.train_split, data_dir=lab.data_dir)
    with lab.alone("judge"):
        params = load_judge(known.arrays, epochs=JUDGE_EPOCHS[lab.budget], path=lab.runs / "judge.npz")
    read = judge(params, images)[1]
    return [float((read[labels == label] == label).mean()) for label in np.unique(labels)]


def variety(lab: Lab, images: np.ndarray, labels: np.ndarray) -> float:
    """The variance of VGG16's features within the classes, as a multiple of that of as many real pictures."""
    real = load_dataset("fashion_mnist", f"test[:{VARIED}]", data_dir=lab.data_dir).arrays
    extractor = _in_vgg16()["extractor"]
    drawn, known = (
        np.mean([features[of == label].var(0).sum() for label in np.unique(of)])
        for features, of in ((extractor(images), labels), (extractor(real["x"]), real["label"]))
    )
    return float(drawn / known)
