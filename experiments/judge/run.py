"""Has an independent classifier read a run's samples: are they the class they were asked to be, and how like real ones?

    .venv/bin/python -m experiments.judge.run --run=runs/fashion_mnist [--epochs=4] [--data_dir=data]

Prints the share of samples read as intended, and the Frechet distance in the classifier's 128 features, with its floor
(training against test images); results.json keeps them. The trained classifier is kept beside this
file (judge.npz, not in the repository).
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from experiments.judge.classifier import Classifier, judge, train
from ldm_jax.data.datasets import load_dataset
from ldm_jax.evaluation.metrics import frechet_distance
from ldm_jax.xla import configure

HERE = Path(__file__).parent


def load_judge(train_set: dict[str, np.ndarray], epochs: int) -> dict:
    """The classifier's parameters: trained once, then read back."""
    like = jax.eval_shape(Classifier().init, jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))["params"]
    leaves, treedef = jax.tree.flatten(like)
    path = HERE / "judge.npz"
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
    train_set, test_set = (load_dataset("fashion_mnist", s, data_dir=args.data_dir).arrays for s in ("train", "test"))
    params = load_judge(train_set, args.epochs)
    reference, read = judge(params, test_set["x"])
    with np.load(args.run / "samples.npz") as samples:
        features, classes = judge(params, samples["images"])
        result = {
            "n": len(classes),
            "read_as_intended": float(np.mean(classes == samples["labels"])),
            "frechet_distance": frechet_distance(features, reference),
            "floor": frechet_distance(judge(params, train_set["x"][: len(classes)])[0], reference),
            "judge_accuracy_on_test_images": float(np.mean(read == test_set["label"])),
        }
    (HERE / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
