"""What experiments measure on trained models: pictures drawn by them, and the cards of these."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.frame import Lab
from experiments.judge.classifier import judge
from experiments.judge.run import load_judge
from ldm_jax.data.datasets import load_dataset
from ldm_jax.evaluation.cards import evaluate_images, evaluate_reconstructions
from ldm_jax.evaluation.features import FeatureExtractor, lpips_distance, vgg16_features
from ldm_jax.pipeline.model import Trained
from ldm_jax.runtime.parallel import replicate
from ldm_jax.runtime.xla import cache_folder
from ldm_jax.sampling import generate, tables
from ldm_jax.sampling.generate import request
from ldm_jax.sampling.guidance_models import NO_GUIDES, Guides

BATCHES = {"smoke": 20, "cpu": 250, "gpu": 1_000}  # pictures at once
REFERENCES = {"smoke": "test[:60]", "cpu": "test", "gpu": "test"}  # the images compared with
JUDGE_EPOCHS = {"smoke": 1, "cpu": 3, "gpu": 4}  # of the classifier that reads what is drawn
VARIED = {"smoke": "test[:60]", "cpu": "test[:1000]", "gpu": "test[:1000]"}  # images whose variety is compared with
RECONSTRUCTED = 2_000  # test images that an autoencoder is to give back


def drawing(lab: Lab, model: Trained, num: int, guides: Guides = NO_GUIDES) -> Callable[..., np.ndarray]:
    """draw(seed, guidance, interval, classifier_scale, params, **table) -> `num` pictures uint8 [N, H, W, C], the same
    number of each class.

    The arguments are as in `generate.Request`, `table` those of `samplers.build_table`, `params` those of another state
    of the model. It compiles when first called.
    """
    batch, labels = min(BATCHES[lab.budget], num), list(range(len(model.class_names)))
    generator = generate.build_generator(model.config, len(labels), batch, guides)
    own = replicate(model.params | guides.params)

    def draw(
        *,
        seed: int = 0,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        classifier_scale: float = 0.0,
        params: dict[str, Any] | None = None,
        **table: Any,
    ) -> np.ndarray:
        wanted = request(num, labels, guidance=guidance, seed=seed, interval=interval)
        if guides.classifier:
            wanted = wanted._replace(classifier_scale=np.full(num, classifier_scale, np.float32))
        given = own if params is None else replicate(params | guides.params)
        batches = generator.images(given, wanted, tables.build_table(model.config, **table))
        return np.concatenate(list(tqdm(batches, total=-(-num // batch), desc="    drawing", leave=False)))

    return draw


def reference(lab: Lab, size: int = 28) -> np.ndarray:
    """The test images, uint8 [N, size, size, 1]."""
    return load_dataset("fashion_mnist", REFERENCES[lab.budget], data_dir=lab.data_dir, image_size=size).arrays["x"]


def cards(lab: Lab, images: np.ndarray, size: int = 28) -> dict[str, dict[str, Any]]:
    """FD, KID, precision and recall of pictures against the test images, each with what one must know to compare it."""
    return evaluate_images(images, reference(lab, size), extractor=in_vgg16(lab), cache=cache_folder() / "features")


def reconstruction_cards(lab: Lab, originals: np.ndarray, given_back: np.ndarray) -> dict[str, dict[str, Any]]:
    """FD, PSNR, SSIM and LPIPS of what an autoencoder gives back of test images."""
    return evaluate_reconstructions(
        originals, given_back, extractor=in_vgg16(lab), lpips=lpips_distance(batch_size=BATCHES[lab.budget]),
        cache=cache_folder() / "features",
    )  # fmt: skip


@functools.cache
def in_vgg16(lab: Lab) -> FeatureExtractor:
    """What pictures are compared by."""
    return vgg16_features(resize=32, batch_size=BATCHES[lab.budget])


def judge_of(lab: Lab) -> dict[str, Any]:
    """The parameters of the classifier of experiments/judge; trained the first time."""
    path = lab.runs / "judge.npz"
    with lab.alone("judge"):
        split = lab.config({}).data.train_split
        known = {} if path.exists() else load_dataset("fashion_mnist", split, data_dir=lab.data_dir).arrays
        return load_judge(known, epochs=JUDGE_EPOCHS[lab.budget], path=path)


def share_read_as(lab: Lab, images: np.ndarray, labels: np.ndarray) -> list[float]:
    """Of each class the share of its pictures that this judge reads as it."""
    read = judge(judge_of(lab), images)[1]
    return [float((read[labels == label] == label).mean()) for label in np.unique(labels)]


def variety(lab: Lab, images: np.ndarray, labels: np.ndarray) -> float:
    """The variance of VGG16's features within the classes, as a multiple of that of real pictures.

    Both are biased variances, which of few pictures are a little too small: of 25 in a class by 4 %, of 100 by 1 %.
    """
    return variance_within(in_vgg16(lab)(images), labels) / variance_of_real(lab)


@functools.cache
def variance_of_real(lab: Lab) -> float:
    """The same of real pictures."""
    real = load_dataset("fashion_mnist", VARIED[lab.budget], data_dir=lab.data_dir).arrays
    return variance_within(in_vgg16(lab)(real["x"]), real["label"])


def variance_within(features: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the classes of the variance of their features [N, D], summed over D."""
    return float(np.mean([features[labels == label].var(0).sum() for label in np.unique(labels)]))
