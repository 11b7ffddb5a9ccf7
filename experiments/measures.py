"""Metrics of the experiments: samples of trained models and their scores (FD, KID, precision, recall, LPIPS, ...)."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import strips
from experiments.judge.classifier import classify
from experiments.judge.run import load_classifier
from experiments.recipes import balanced_recipe
from experiments.runner import Row, Workspace
from ldm_jax.data.datasets import load_dataset
from ldm_jax.evaluation.cards import evaluate_images, evaluate_reconstructions
from ldm_jax.evaluation.features import FeatureExtractor, lpips_distance, vgg16_features
from ldm_jax.evaluation.metrics import frechet_distance
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.runtime.parallel import replicate
from ldm_jax.runtime.xla import cache_folder
from ldm_jax.sampling.concat_inputs import ConcatImages
from ldm_jax.sampling.guidance_models import GuidanceModels
from ldm_jax.sampling.inputs import sample_inputs
from ldm_jax.sampling.tables import make_table

BATCHES = {"smoke": 20, "minutes": 250, "cpu": 250, "gpu": 1_000}  # batch size of sampling and of feature extraction
REFERENCES = {
    "smoke": "test[:60]",
    "minutes": "test",
    "cpu": "test",
    "gpu": "test",
}  # reference images of FD, KID, precision and recall
CLASSIFIER_EPOCHS = {"smoke": 1, "minutes": 3, "cpu": 4, "gpu": 4}  # of the evaluation classifier
DIVERSITY_REFERENCES = {
    "smoke": "test[:60]",
    "minutes": "test[:1000]",
    "cpu": "test[:1000]",
    "gpu": "test[:1000]",
}  # real images of the diversity
NUM_RECONSTRUCTIONS = 2_000  # test images
NO_GUIDANCE_MODELS = GuidanceModels()


def make_sample(
    workspace: Workspace,
    model: LatentDiffusion,
    params: Params,
    num: int,
    guidance_models: GuidanceModels = NO_GUIDANCE_MODELS,
    concat_images: ConcatImages | None = None,
) -> Callable[..., np.ndarray]:
    """Makes sample(params=None, **fields) -> images uint8 [num, H, W, C], with equal numbers of each class.

    `fields` are those of the recipe (`recipes.balanced_recipe`), `params` replace the model's. The first call compiles.

    Args:
      workspace: its budget sets the batch size.
      model, params: the model.
      num: number of images.
      guidance_models: classifier or CLIP, for recipes with that guidance.
      concat_images: inputs of the concat conditioning.
    """
    batch = min(BATCHES[workspace.budget], num)
    sampler, base_params = guidance_models.sampler(model, batch), replicate(params | guidance_models.params)

    def sample(*, params: Params | None = None, **fields: Any) -> np.ndarray:
        recipe = balanced_recipe(model, num, **fields)
        state = base_params if params is None else replicate(params | guidance_models.params)
        _, inputs = sample_inputs(model, state, recipe, sampler, concat_images)
        batches = sampler.images(state, inputs, make_table(model, recipe.solving))
        return np.concatenate(list(tqdm(batches, total=-(-num // batch), desc="    sampling", leave=False)))

    return sample


def test_images(workspace: Workspace, size: int = 28) -> np.ndarray:
    """The test images, uint8 [N, size, size, 1]."""
    return load_dataset(
        "fashion_mnist", REFERENCES[workspace.budget], data_dir=workspace.data_dir, image_size=size
    ).arrays["x"]


def cards(workspace: Workspace, images: np.ndarray, size: int = 28) -> dict[str, dict[str, Any]]:
    """Cards of FD, KID, precision and recall of samples uint8 [N, size, size, 1] against the test images.

    A card holds the value and what makes it comparable: number of images, reference, resize, weights.
    """
    return evaluate_images(
        images, test_images(workspace, size), extractor=vgg16_extractor(workspace), cache=cache_folder() / "features"
    )


def reconstruction_cards(
    workspace: Workspace, originals: np.ndarray, reconstructed: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Cards of FD, PSNR, SSIM and LPIPS of reconstructed test images, uint8 [N, H, W, 1]."""
    return evaluate_reconstructions(
        originals,
        reconstructed,
        extractor=vgg16_extractor(workspace),
        lpips=lpips_distance(batch_size=BATCHES[workspace.budget]),
        cache=cache_folder() / "features",
    )


@functools.cache
def vgg16_extractor(workspace: Workspace) -> FeatureExtractor:
    """The VGG16 feature extractor of the Fréchet distance, at 32 x 32 pixels."""
    return vgg16_features(resize=32, batch_size=BATCHES[workspace.budget])


def classifier_params(workspace: Workspace) -> dict[str, Any]:
    """The parameters of the evaluation classifier (experiments/judge), which the first call trains."""
    path = workspace.runs / "judge.npz"
    with workspace.lock("judge"):
        split = workspace.config({}).data.train_split
        train_set = {} if path.exists() else load_dataset("fashion_mnist", split, data_dir=workspace.data_dir).arrays
        return load_classifier(train_set, epochs=CLASSIFIER_EPOCHS[workspace.budget], path=path)


def scores(workspace: Workspace, images: np.ndarray) -> Row:
    """All scores of samples uint8 [N, 28, 28, 1] with classes in turn, and a strip of the first 20: a part of a row."""
    accuracy = class_accuracy(workspace, images, np.arange(len(images)) % 10)
    return {
        "cards": cards(workspace, images),
        "classifier_accuracy": float(np.mean(accuracy)),
        "classifier_fd": classifier_fd(workspace, images),
        "images": strips.encode(images[:20]),
    }


def fd(row: Row) -> float:
    """FD-VGG16 of a row with `scores`."""
    return row["cards"]["FD-VGG16"]["value"]


# Columns of a table of rows with `scores`: name -> (value, digits), see `tables.by_arm`.
SCORES: dict[str, tuple[Callable[[Row], float], int]] = {
    "FD-VGG16": (fd, 1),
    "precision": (lambda row: row["cards"]["precision-VGG16"]["value"], 2),
    "recall": (lambda row: row["cards"]["recall-VGG16"]["value"], 2),
    "FD in the classifier's features": (lambda row: row["classifier_fd"], 2),
    "classifier accuracy": (lambda row: row["classifier_accuracy"], 3),
}


def classifier_fd(workspace: Workspace, images: np.ndarray) -> float:
    """The Fréchet distance of images uint8 [N, 28, 28, 1] to the test images, in the classifier's features."""
    return frechet_distance(classify(classifier_params(workspace), images)[0], test_features(workspace))


@functools.cache
def test_features(workspace: Workspace) -> np.ndarray:
    """The evaluation classifier's features [N, 128] of the test images."""
    return classify(classifier_params(workspace), test_images(workspace))[0]


def class_accuracy(workspace: Workspace, images: np.ndarray, labels: np.ndarray) -> list[float]:
    """Classifier accuracy of each class: the fraction of its images [N, ...] that are classified as their label [N]."""
    predicted = classify(classifier_params(workspace), images)[1]
    return [float((predicted[labels == label] == label).mean()) for label in np.unique(labels)]


def diversity(workspace: Workspace, images: np.ndarray, labels: np.ndarray) -> float:
    """Diversity: the within-class variance of VGG16's features, relative to that of real images.

    Both are biased variances: too small by 4 % with 25 images per class, by 1 % with 100.
    """
    return within_class_variance(vgg16_extractor(workspace)(images), labels) / real_variance(workspace)


@functools.cache
def real_variance(workspace: Workspace) -> float:
    """The within-class variance of real images."""
    real = load_dataset("fashion_mnist", DIVERSITY_REFERENCES[workspace.budget], data_dir=workspace.data_dir).arrays
    return within_class_variance(vgg16_extractor(workspace)(real["x"]), real["label"])


def within_class_variance(features: np.ndarray, labels: np.ndarray) -> float:
    """The variance of features [N, D] summed over D, within each class of labels [N], averaged over the classes."""
    return float(np.mean([features[labels == label].var(0).sum() for label in np.unique(labels)]))
