"""What experiments measure on trained models: their samples, and the cards of these."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.frame import Lab
from experiments.judge.classifier import judge
from experiments.judge.run import load_judge
from experiments.recipes import each_class
from ldm_jax.data.datasets import load_dataset
from ldm_jax.evaluation.cards import evaluate_images, evaluate_reconstructions
from ldm_jax.evaluation.features import FeatureExtractor, lpips_distance, vgg16_features
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.runtime.parallel import replicate
from ldm_jax.runtime.xla import cache_folder
from ldm_jax.sampling.concat_inputs import ConcatImages
from ldm_jax.sampling.guidance_models import GuidanceModels
from ldm_jax.sampling.inputs import sample_inputs
from ldm_jax.sampling.tables import make_table

BATCHES = {"smoke": 20, "cpu": 250, "gpu": 1_000}  # images at a time
REFERENCES = {"smoke": "test[:60]", "cpu": "test", "gpu": "test"}  # the images compared with
JUDGE_EPOCHS = {"smoke": 1, "cpu": 3, "gpu": 4}  # of the classifier that reads the samples
VARIED = {"smoke": "test[:60]", "cpu": "test[:1000]", "gpu": "test[:1000]"}  # images whose variety is compared with
RECONSTRUCTED = 2_000  # test images
NO_GUIDES = GuidanceModels()


def sampling(
    lab: Lab,
    model: LatentDiffusion,
    params: Params,
    num: int,
    guides: GuidanceModels = NO_GUIDES,
    concat_images: ConcatImages | None = None,
) -> Callable[..., np.ndarray]:
    """sample(params=None, **choices) -> `num` images uint8 [N, H, W, C], the same number of each class.

    `choices` are those of `recipes.each_class`; `params` are another state of the model's. It compiles when first
    called.

    Args:
      lab: says how many at a time.
      model, params: the model.
      num: of images.
      guides: what guides, where the recipe's guidance says so.
      concat_images: what concat conditioning is made of.
    """
    batch = min(BATCHES[lab.budget], num)
    sampler, own = guides.sampler(model, batch), replicate(params | guides.params)

    def sample(*, params: Params | None = None, **choices: Any) -> np.ndarray:
        recipe = each_class(model, num, **choices)
        given = own if params is None else replicate(params | guides.params)
        _, inputs = sample_inputs(model, given, recipe, sampler, concat_images)
        batches = sampler.images(given, inputs, make_table(model, recipe.solving))
        return np.concatenate(list(tqdm(batches, total=-(-num // batch), desc="    sampling", leave=False)))

    return sample


def reference(lab: Lab, size: int = 28) -> np.ndarray:
    """The test images, uint8 [N, size, size, 1]."""
    return load_dataset("fashion_mnist", REFERENCES[lab.budget], data_dir=lab.data_dir, image_size=size).arrays["x"]


def cards(lab: Lab, images: np.ndarray, size: int = 28) -> dict[str, dict[str, Any]]:
    """FD, KID, precision and recall of samples against the test images, each with what one must know to compare it."""
    return evaluate_images(images, reference(lab, size), extractor=in_vgg16(lab), cache=cache_folder() / "features")


def reconstruction_cards(lab: Lab, originals: np.ndarray, reconstructed: np.ndarray) -> dict[str, dict[str, Any]]:
    """FD, PSNR, SSIM and LPIPS of reconstructed test images."""
    return evaluate_reconstructions(
        originals, reconstructed, extractor=in_vgg16(lab), lpips=lpips_distance(batch_size=BATCHES[lab.budget]),
        cache=cache_folder() / "features",
    )  # fmt: skip


@functools.cache
def in_vgg16(lab: Lab) -> FeatureExtractor:
    """The features that images are compared by."""
    return vgg16_features(resize=32, batch_size=BATCHES[lab.budget])


def judge_of(lab: Lab) -> dict[str, Any]:
    """The parameters of the classifier of experiments/judge; trained the first time."""
    path = lab.runs / "judge.npz"
    with lab.alone("judge"):
        split = lab.config({}).data.train_split
        known = {} if path.exists() else load_dataset("fashion_mnist", split, data_dir=lab.data_dir).arrays
        return load_judge(known, epochs=JUDGE_EPOCHS[lab.budget], path=path)


def share_read_as(lab: Lab, images: np.ndarray, labels: np.ndarray) -> list[float]:
    """Of each class the share of its images that this judge reads as it."""
    read = judge(judge_of(lab), images)[1]
    return [float((read[labels == label] == label).mean()) for label in np.unique(labels)]


def variety(lab: Lab, images: np.ndarray, labels: np.ndarray) -> float:
    """The variance of VGG16's features within the classes, as a multiple of that of real images.

    Both are biased variances, which of few images are a little too small: of 25 in a class by 4 %, of 100 by 1 %.
    """
    return variance_within(in_vgg16(lab)(images), labels) / variance_of_real(lab)


@functools.cache
def variance_of_real(lab: Lab) -> float:
    """The same of real images."""
    real = load_dataset("fashion_mnist", VARIED[lab.budget], data_dir=lab.data_dir).arrays
    return variance_within(in_vgg16(lab)(real["x"]), real["label"])


def variance_within(features: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the classes of the variance of their features [N, D], summed over D."""
    return float(np.mean([features[labels == label].var(0).sum() for label in np.unique(labels)]))
