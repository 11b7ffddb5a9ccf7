"""What does guidance improve, and at what cost? Classifier-free guidance, classifier guidance and none.

    python experiments/guidance/run.py [--budget=smoke|cpu|gpu]

One trained model at guidance scales from none to too high: classifier-free (Ho & Salimans 2022), within an interval of
the timesteps (Kynkäänniemi 2024), and by a classifier of noisy latents (Dhariwal & Nichol 2021).
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import measures, runner, strips, tables
from experiments.recipes import make_guidance
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.pipeline.load import load
from ldm_jax.sampling.guidance_models import GuidanceModels, classifier_for


class Setting(NamedTuple):
    """The guidance of one arm: a point of the figure."""

    method: str
    scale: float
    guidance: float  # classifier-free: 1 = conditional, 0 = unconditional
    interval: tuple[float, float] = (0.0, 1.0)
    classifier_scale: float = 0.0


FREE, WITHIN = "classifier-free", "classifier-free from 0.1 to 0.9"
BY_CLASSIFIER, BY_BOTH = "classifier on unconditional", "classifier on conditional"
SETTINGS = [
    *(Setting(FREE, w, w) for w in (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)),
    *(Setting(WITHIN, w, w, (0.1, 0.9)) for w in (1.5, 2.0, 3.0, 5.0, 8.0)),
    *(Setting(BY_CLASSIFIER, s, 0.0, classifier_scale=s) for s in (0.0, 2.0, 4.0, 8.0)),
    *(Setting(BY_BOTH, s, 1.0, classifier_scale=s) for s in (1.0, 2.0, 4.0)),
]
ARMS = {f"{setting.method}, {setting.scale:g}": setting for setting in SETTINGS}
SMOKE_ARMS = (f"{FREE}, 1", f"{FREE}, 8", f"{BY_CLASSIFIER}, 8")
SHOWN = (f"{FREE}, 1", f"{FREE}, 2", f"{FREE}, 8", f"{WITHIN}, 8", f"{BY_CLASSIFIER}, 0", f"{BY_CLASSIFIER}, 8")
BUDGETS = {  # steps of the classifier, images
    "smoke": (2, 10),
    "cpu": (2_500, 250),
    "gpu": (5_000, 5_000),
}
CLASSIFIER = {"classifier.block_out_channels": (32, 64), "classifier.attention": (False, True)}


def plan(budget: str) -> list[tuple[str, int]]:
    return [(arm, 0) for arm in (SMOKE_ARMS if budget == "smoke" else ARMS)]


def classifier_of(workspace: Workspace) -> Path:
    """The run folder of the classifier of the shared model's noisy latents."""
    smaller = {} if workspace.budget == "gpu" else CLASSIFIER
    fields = {
        "stages": ("autoencoder", "classifier"),
        "classifier.steps": BUDGETS[workspace.budget][0],
        "classifier.batch_size": workspace.batch_size,
    }
    return workspace.on_shared_latents("classifier", smaller | fields)


@functools.cache
def shared_sample(workspace: Workspace) -> Callable[..., np.ndarray]:
    """The `sample` of the shared model with the classifier (`measures.make_sample`)."""
    model, params = load(workspace.shared_model())
    guidance_models = GuidanceModels(classifier_for(classifier_of(workspace), model, params))
    return measures.make_sample(workspace, model, params, BUDGETS[workspace.budget][1], guidance_models)


def first(workspace: Workspace) -> None:
    shared_sample(workspace)
    measures.classifier_params(workspace)


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    setting, num = ARMS[arm], BUDGETS[workspace.budget][1]
    classifier_scale = {"classifier": str(classifier_of(workspace)), "classifier_scale": setting.classifier_scale}
    guidance = make_guidance(setting.guidance, setting.interval)._replace(**classifier_scale)
    images = shared_sample(workspace)(seed=seed, guidance=guidance)
    accuracy = measures.class_accuracy(workspace, images, np.arange(num) % 10)
    return setting._asdict() | {
        "cards": measures.cards(workspace, images),
        "classifier_accuracy": float(np.mean(accuracy)),
        "images": strips.encode(images[: 2 * 10]),
    }


SCORES = {
    "FD-VGG16": (lambda row: row["cards"]["FD-VGG16"]["value"], 1),
    "precision": (lambda row: row["cards"]["precision-VGG16"]["value"], 2),
    "recall": (lambda row: row["cards"]["recall-VGG16"]["value"], 2),
    "classifier accuracy": (lambda row: row["classifier_accuracy"], 2),
}


def table(rows: Rows) -> str:
    return tables.by_arm(rows, SCORES)


def answer(rows: Rows) -> str:
    def of(name: str, arm: str) -> str:
        score, digits = SCORES[name]
        return f"{tables.mean(rows, arm, score):.{digits}f}"

    scales = {name: [row["scale"] for row in rows.values() if row["method"] == name] for name in (FREE, BY_CLASSIFIER)}
    none, most = (f"{FREE}, {end(scales[FREE]):g}" for end in (min, max))
    by_classifier = f"{BY_CLASSIFIER}, {max(scales[BY_CLASSIFIER]):g}"
    best = min(tables.arms(rows), key=lambda arm: tables.mean(rows, arm, SCORES["FD-VGG16"][0]))
    return (
        f"From no guidance to {most} the classifier accuracy goes from {of('classifier accuracy', none)} to "
        f"{of('classifier accuracy', most)}, recall from {of('recall', none)} to {of('recall', most)}. The lowest "
        f"FD has {best} ({of('FD-VGG16', best)}; without guidance {of('FD-VGG16', none)}). Classifier guidance alone "
        f"({by_classifier}) reaches a classifier accuracy of {of('classifier accuracy', by_classifier)}."
    )


def plot(rows: Rows) -> Figure:
    """A panel for each score, a line for each method; below, samples at the lowest and highest scales."""
    ends = [arm for arm in SHOWN if any(row["arm"] == arm for row in rows.values())]
    shown = [{"": next(row["images"] for row in rows.values() if row["arm"] == arm)} for arm in ends]
    figure = plt.figure(figsize=(13, 3.5 + strips.grid_height(shown, 13)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.5, strips.grid_height(shown, 13)])
    axes = above.subplots(1, len(SCORES))
    for axis, (name, (score, _)) in zip(axes, SCORES.items()):
        for method in dict.fromkeys(row["method"] for row in rows.values()):
            points = sorted((row["scale"], score(row)) for row in rows.values() if row["method"] == method)
            axis.plot(*zip(*points), marker=".", label=method)
        axis.set(title=name, xlabel="guidance scale")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7)
    strips.plot_in(below, shown, ends)
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent, "What does guidance improve, and at what cost?", plan, measure, table, answer, plot, first
)

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
