"""Evaluates a run's samples by an independent classifier: classifier accuracy and Fréchet distance in its features.

    .venv/bin/python -m experiments.judge.run --run=runs/fashion_mnist [--epochs=4] [--data_dir=data]

Prints and writes to results.json: the classifier accuracy of the samples (predicted class = condition), the Fréchet
distance to the test images in the classifier's 128 features, that of training images (the floor) and of reconstructions
by the autoencoder alone. The trained classifier is stored in judge.npz in this folder (not in the repository).
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.judge.classifier import Classifier, classify, train
from ldm_jax.data.datasets import load_dataset
from ldm_jax.evaluation.metrics import frechet_distance
from ldm_jax.evaluation.scoring import reconstruct
from ldm_jax.pipeline.load import load
from ldm_jax.runtime.xla import configure

HERE = Path(__file__).parent


class ClassifierEvaluation(NamedTuple):
    """The evaluation classifier, the data sets, and its outputs on the test images."""

    params: dict
    train_set: dict[str, np.ndarray]  # x uint8 [N, 28, 28, 1], label [N]
    test_set: dict[str, np.ndarray]
    reference: np.ndarray  # [10000, 128], features of the test images
    predicted: np.ndarray  # [10000], predicted classes of the test images

    def scores(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Fréchet distance of images uint8 [N, 28, 28, 1] to the test images, classifier accuracy for labels [N]."""
        features, classes = classify(self.params, images)
        return {
            "frechet_distance": frechet_distance(features, self.reference),
            "classifier_accuracy": float((classes == labels).mean()),
        }


def load_evaluation(data_dir: str, epochs: int = 4) -> ClassifierEvaluation:
    """Loads the data sets and the classifier, which the first call trains."""
    train_set, test_set = (load_dataset("fashion_mnist", s, data_dir=data_dir).arrays for s in ("train", "test"))
    params = load_classifier(train_set, epochs, HERE / "judge.npz")
    return ClassifierEvaluation(params, train_set, test_set, *classify(params, test_set["x"]))


def load_classifier(train_set: dict[str, np.ndarray], epochs: int, path: Path) -> dict:
    """The classifier's parameters, loaded from `path`; the first call trains it and writes the file (.npz)."""
    shapes = jax.eval_shape(Classifier().init, jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    if not path.exists():
        params = train(train_set["x"], train_set["label"], epochs=epochs, seed=0)
        np.savez(path, *jax.tree.leaves(params))
    with np.load(path) as file:
        return jax.tree.unflatten(treedef, [file[f"arr_{i}"] for i in range(len(leaves))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/fashion_mnist"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    configure()
    evaluation = load_evaluation(args.data_dir, args.epochs)
    with np.load(args.run / "samples.npz") as samples:
        images, labels = samples["images"], samples["labels"]
    real = {name: values[: len(images)] for name, values in evaluation.train_set.items()}
    result = (
        {"n": len(images)}
        | evaluation.scores(images, labels)
        | {
            "floor": evaluation.scores(real["x"], real["label"])["frechet_distance"],
            "accuracy_on_test_images": float(np.mean(evaluation.predicted == evaluation.test_set["label"])),
        }
    )
    decoded = reconstruct(*load(args.run), evaluation.test_set["x"], 500)
    if decoded is not None:
        result["autoencoder"] = evaluation.scores(decoded, evaluation.test_set["label"])["frechet_distance"]
    (HERE / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
