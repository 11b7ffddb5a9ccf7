"""Has an independent classifier read a run's samples: are they the class they were asked to be, and how like real ones?

    .venv/bin/python -m experiments.judge.run --run=runs/fashion_mnist [--epochs=4] [--data_dir=data]

Prints the share of samples read as intended, and the Frechet distance in the classifier's 128 features, with its floor
(training against test images) and that of the autoencoder alone; results.json keeps them. The trained classifier is
kept beside this file (judge.npz, not in the repository).
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.judge.classifier import Classifier, judge, train
from ldm_jax.data.datasets import load_dataset
from ldm_jax.evaluation.metrics import frechet_distance
from ldm_jax.evaluation.scoring import reconstruct
from ldm_jax.pipeline.load import load
from ldm_jax.runtime.xla import configure

HERE = Path(__file__).parent


class Court(NamedTuple):
    """The judge and what it compares with."""

    params: dict
    train_set: dict[str, np.ndarray]  # x uint8 [N, 28, 28, 1], label [N]
    test_set: dict[str, np.ndarray]
    reference: np.ndarray  # [10000, 128], the features of the test images
    read: np.ndarray  # [10000], the classes that the judge reads there

    def scores(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """How far images uint8 [N, 28, 28, 1] are from real ones, and the share read as their labels [N]."""
        features, classes = judge(self.params, images)
        return {
            "judge_distance": frechet_distance(features, self.reference),
            "read_as_intended": float((classes == labels).mean()),
        }


def open_court(data_dir: str, epochs: int = 4) -> Court:
    """Reads the data and the judge, which is trained the first time."""
    train_set, test_set = (load_dataset("fashion_mnist", s, data_dir=data_dir).arrays for s in ("train", "test"))
    params = load_judge(train_set, epochs, HERE / "judge.npz")
    return Court(params, train_set, test_set, *judge(params, test_set["x"]))


def load_judge(train_set: dict[str, np.ndarray], epochs: int, path: Path) -> dict:
    """The classifier's parameters: trained once, then read back from `path`."""
    like = jax.eval_shape(Classifier().init, jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))["params"]
    leaves, treedef = jax.tree.flatten(like)
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
    court = open_court(args.data_dir, args.epochs)
    with np.load(args.run / "samples.npz") as samples:
        images, labels = samples["images"], samples["labels"]
    real = {name: values[: len(images)] for name, values in court.train_set.items()}
    result = (
        {"n": len(images)}
        | court.scores(images, labels)
        | {
            "floor": court.scores(real["x"], real["label"])["judge_distance"],
            "judge_accuracy_on_test_images": float(np.mean(court.read == court.test_set["label"])),
        }
    )
    decoded = reconstruct(*load(args.run), court.test_set["x"], 500)
    if decoded is not None:
        result["autoencoder"] = court.scores(decoded, court.test_set["label"])["judge_distance"]
    (HERE / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
