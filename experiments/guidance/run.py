"""What does guidance buy, and what does it cost? Classifier-free against classifier guidance against none.

    python experiments/guidance/run.py [--budget=smoke|cpu|gpu]

One trained model, guided by scales from none to far too much: by itself (Ho & Salimans 2022), within an interval of the
timesteps (Kynkäänniemi 2024), and by a classifier of noisy latents (Dhariwal & Nichol 2021).
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import frame, measures, strips, tables
from experiments.frame import Experiment, Lab, Row, Rows
from experiments.recipes import guided
from ldm_jax.pipeline.load import load
from ldm_jax.sampling.guidance_models import GuidanceModels, classifier_for


class Setting(NamedTuple):
    """One point of the figure."""

    way: str
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
ARMS = {f"{setting.way}, {setting.scale:g}": setting for setting in SETTINGS}
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


def classifier_of(lab: Lab) -> Path:
    """The run with a classifier of the shared model's latents."""
    smaller = {} if lab.budget == "gpu" else CLASSIFIER
    fields = {
        "stages": ("autoencoder", "classifier"),
        "classifier.steps": BUDGETS[lab.budget][0],
        "classifier.batch_size": lab.batch_size,
    }
    return lab.on_shared_latents("classifier", smaller | fields)


@functools.cache
def sampling(lab: Lab) -> Callable[..., np.ndarray]:
    """The `sample` of the shared model, guided by the classifier: see `measures.sampling`."""
    model, params = load(lab.shared_model())
    guides = GuidanceModels(classifier_for(classifier_of(lab), model, params))
    return measures.sampling(lab, model, params, BUDGETS[lab.budget][1], guides)


def first(lab: Lab) -> None:
    sampling(lab)
    measures.judge_of(lab)


def measure(lab: Lab, arm: str, seed: int) -> Row:
    setting, num = ARMS[arm], BUDGETS[lab.budget][1]
    by_classifier = {"classifier": str(classifier_of(lab)), "classifier_scale": setting.classifier_scale}
    guidance = guided(setting.guidance, setting.interval)._replace(**by_classifier)
    images = sampling(lab)(seed=seed, guidance=guidance)
    read = measures.share_read_as(lab, images, np.arange(num) % 10)
    return setting._asdict() | {
        "cards": measures.cards(lab, images),
        "read_as_intended": float(np.mean(read)),
        "pictures": strips.packed(images[: 2 * 10]),
    }


SCORES = {
    "FD-VGG16": (lambda row: row["cards"]["FD-VGG16"]["value"], 1),
    "precision": (lambda row: row["cards"]["precision-VGG16"]["value"], 2),
    "recall": (lambda row: row["cards"]["recall-VGG16"]["value"], 2),
    "read as intended": (lambda row: row["read_as_intended"], 2),
}


def table(rows: Rows) -> str:
    return tables.by_arm(rows, SCORES)


def answer(rows: Rows) -> str:
    def of(name: str, arm: str) -> str:
        score, digits = SCORES[name]
        return f"{tables.mean(rows, arm, score):.{digits}f}"

    scales = {way: [row["scale"] for row in rows.values() if row["way"] == way] for way in (FREE, BY_CLASSIFIER)}
    none, most = (f"{FREE}, {end(scales[FREE]):g}" for end in (min, max))
    led = f"{BY_CLASSIFIER}, {max(scales[BY_CLASSIFIER]):g}"
    best = min(tables.arms(rows), key=lambda arm: tables.mean(rows, arm, SCORES["FD-VGG16"][0]))
    return (
        f"From no guidance to {most} the share read as intended goes from "
        f"{of('read as intended', none)} to {of('read as intended', most)}, recall from {of('recall', none)} to "
        f"{of('recall', most)}. Nearest to the data is {best} (FD {of('FD-VGG16', best)}; without guidance "
        f"{of('FD-VGG16', none)}). A classifier alone ({led}) gets {of('read as intended', led)} read as intended."
    )


def draw(rows: Rows) -> Figure:
    """A panel for each score, a line for each way; below what the least and the most guidance draws."""
    ends = [arm for arm in SHOWN if any(row["arm"] == arm for row in rows.values())]
    shown = [{"": next(row["pictures"] for row in rows.values() if row["arm"] == arm)} for arm in ends]
    figure = plt.figure(figsize=(13, 3.5 + strips.height_of(shown, 13)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.5, strips.height_of(shown, 13)])
    axes = above.subplots(1, len(SCORES))
    for axis, (name, (score, _)) in zip(axes, SCORES.items()):
        for way in dict.fromkeys(row["way"] for row in rows.values()):
            some = sorted((row["scale"], score(row)) for row in rows.values() if row["way"] == way)
            axis.plot(*zip(*some), marker=".", label=way)
        axis.set(title=name, xlabel="scale")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7)
    strips.draw_in(below, shown, ends)
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent, "What does guidance buy, and what does it cost?", plan, measure, table, answer, draw, first
)

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
