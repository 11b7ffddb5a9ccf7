"""What does guidance buy, and what does it cost? Classifier-free against classifier guidance against none.

    .venv/bin/python -m ldm_jax.train --config=configs/fashion_mnist_classifier.py
    .venv/bin/python -m experiments.guidance.run --run=runs/fashion_mnist --classifier=runs/fashion_mnist_classifier
                                                 [--budget=smoke|cpu|gpu] [--data_dir=data]

FD, precision and recall in VGG16's features, and the share that the judge of experiments/judge reads as intended, over
the scale. What is in results.json already is not measured again; figure.png is drawn from it.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from experiments.judge.run import open_court
from ldm_jax import guides, samplers, trained
from ldm_jax.evaluation.features import vgg16_features
from ldm_jax.evaluation.metrics import frechet_distance, precision_recall
from ldm_jax.generate import request
from ldm_jax.training.parallel import replicate
from ldm_jax.xla import configure

HERE = Path(__file__).parent
BUDGETS = {"smoke": 100, "cpu": 1000, "gpu": 10_000}  # pictures for each setting
BATCH = 250


class Setting(NamedTuple):
    """One point of the figure."""

    arm: str
    scale: float
    guidance: float  # classifier-free: 1 = conditional, 0 = unconditional
    classifier: float
    interval: tuple[float, float]


SETTINGS = [
    *(Setting("classifier-free", w, w, 0.0, (0.0, 1.0)) for w in (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)),
    *(Setting("classifier-free from 0.1 to 0.9", w, w, 0.0, (0.1, 0.9)) for w in (1.5, 2.0, 3.0, 5.0, 8.0)),
    *(Setting("classifier on unconditional", s, 0.0, s, (0.0, 1.0)) for s in (0.0, 1.0, 2.0, 4.0, 8.0)),
    *(Setting("classifier on conditional", s, 1.0, s, (0.0, 1.0)) for s in (0.5, 1.0, 2.0, 4.0)),
]
PANELS = {"fd_vgg16": "FD-VGG16", "precision": "precision", "recall": "recall", "read_as_intended": "read as intended"}


def draw(results: dict[str, dict], path: Path) -> None:
    """A panel for each score, a line for each arm."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 3.8))
    for axis, (score, title) in zip(axes, PANELS.items()):
        for arm in dict.fromkeys(row["arm"] for row in results.values()):
            rows = sorted((row["scale"], row[score]) for row in results.values() if row["arm"] == arm)
            axis.plot(*zip(*rows), marker=".", label=arm)
        axis.set(title=title, xlabel="scale")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/fashion_mnist"))
    parser.add_argument("--classifier", type=Path, default=Path("runs/fashion_mnist_classifier"))
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    configure()
    path, num = HERE / "results.json", BUDGETS[args.budget]
    results = json.loads(path.read_text()) if path.exists() else {}
    court, model = open_court(args.data_dir), trained.load(args.run)
    guide = guides.classifier_for(args.classifier, model)
    extractor = vgg16_features(resize=model.config.evaluation.resize, batch_size=BATCH)
    reference = extractor(court.test_set["x"])
    generator = samplers.build_generator(model.config, 10, BATCH, guides.Guides(guide))
    params, table = replicate(model.params | {"classifier": guide.params}), samplers.build_table(model.config)
    for setting in SETTINGS:
        name = f"{args.budget} {setting.arm} {setting.scale:g}"
        if name not in results:
            wanted = request(
                num,
                list(range(10)),
                guidance=setting.guidance,
                seed=0,
                interval=setting.interval,
                classifier_scale=np.full(num, setting.classifier, np.float32),
            )
            batches = tqdm(generator.images(params, wanted, table), total=-(-num // BATCH), desc=name)
            images = np.concatenate(list(batches))
            features = extractor(images)
            precision, recall = precision_recall(features, reference)
            results[name] = (
                setting._asdict()
                | {
                    "n": num,
                    "fd_vgg16": frechet_distance(features, reference),
                    "precision": precision,
                    "recall": recall,
                }
                | court.scores(images, wanted.labels)
            )
            path.write_text(json.dumps(results, indent=1) + "\n")
        row = results[name]
        print(f"{name:>45}  " + "  ".join(f"{key} {row[key]:.3f}" for key in PANELS), flush=True)
    draw(results, HERE / "figure.png")


if __name__ == "__main__":
    main()
