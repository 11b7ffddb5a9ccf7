"""What does guidance improve, and at what cost? Classifier-free, classifier and autoguidance, and none.

    python experiments/guidance/run.py [--budget=smoke|minutes|cpu|gpu]

One trained model at guidance scales from none to too high: classifier-free (Ho & Salimans 2022), within an interval of
the timesteps (Kynkäänniemi 2024), and by a classifier of noisy latents (Dhariwal & Nichol 2021). With budget cpu, on
the main job, also projected (Sadat 2024) and by an earlier checkpoint (Karras 2024) with the same or the null
condition, but not by a classifier.
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

from experiments import budgets, measures, runner, strips, tables
from experiments.recipes import balanced_recipe, make_guidance
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.pipeline.load import load
from ldm_jax.sampling.guidance_models import GuidanceModels, classifier_for, guidance_models


class Setting(NamedTuple):
    """The guidance of one arm: a point of the figure."""

    method: str
    scale: float
    guidance: float  # classifier-free: 1 = conditional, 0 = unconditional
    interval: tuple[float, float] = (0.0, 1.0)
    classifier_scale: float = 0.0
    parallel: float = 1.0  # adaptive projected guidance: the part of the update along the prediction that is kept
    step: int = 0  # autoguidance: the step of the earlier checkpoint
    null: bool = False  # which has the null condition


FREE, WITHIN = "classifier-free", "classifier-free from 0.1 to 0.9"
BY_CLASSIFIER, BY_BOTH = "classifier on unconditional", "classifier on conditional"
SETTINGS = [
    *(Setting(FREE, w, w) for w in (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)),
    *(Setting(WITHIN, w, w, (0.1, 0.9)) for w in (1.5, 2.0, 3.0, 5.0, 8.0)),
    *(Setting(BY_CLASSIFIER, s, 0.0, classifier_scale=s) for s in (0.0, 2.0, 4.0, 8.0)),
    *(Setting(BY_BOTH, s, 1.0, classifier_scale=s) for s in (1.0, 2.0, 4.0)),
]
PROJECTED, EARLIER = "projected", "autoguidance by the checkpoint at step {}"
EARLIER_NULL = "autoguidance by the null condition of the checkpoint at step {}, from 0.1 to 0.9"
ON_MAIN_JOB = [
    *(Setting(FREE, w, w) for w in (1.0, 1.5, 2.0, 3.0)),
    *(Setting(WITHIN, w, w, (0.1, 0.9)) for w in (1.5, 1.75, 2.0, 3.0)),
    *(Setting(PROJECTED, w, w, parallel=0.0) for w in (2.0, 3.0)),
    *(Setting(EARLIER.format(step), w, w, step=step) for step in (500, 1_500) for w in (1.5, 2.0, 3.0)),
    *(
        Setting(EARLIER_NULL.format(step), w, w, (0.1, 0.9), step=step, null=True)
        for step in (500, 1_000)
        for w in (1.75, 2.0, 2.5)
    ),
]
ARMS = {f"{setting.method}, {setting.scale:g}": setting for setting in (*SETTINGS, *ON_MAIN_JOB)}
MAIN_JOB_ARMS = [arm for arm, setting in ARMS.items() if setting in ON_MAIN_JOB]
SMOKE_ARMS = (f"{FREE}, 1", f"{FREE}, 8", f"{BY_CLASSIFIER}, 8")
SHOWN = (f"{FREE}, 1", f"{FREE}, 2", f"{FREE}, 8", f"{WITHIN}, 8", f"{BY_CLASSIFIER}, 0", f"{BY_CLASSIFIER}, 8")
SHOWN_ON_MAIN_JOB = (
    f"{WITHIN}, 1.75",
    f"{PROJECTED}, 3",
    f"{EARLIER.format(500)}, 2",
    f"{EARLIER_NULL.format(1_000)}, 2",
)
BUDGETS = {  # steps of the classifier, images
    "smoke": (2, 10),
    "minutes": (2_500, 250),
    "cpu": (0, 5_000),
    "gpu": (5_000, 5_000),
}
PLANS = {"smoke": SMOKE_ARMS, "cpu": MAIN_JOB_ARMS}  # of the other budgets: those of SETTINGS
CLASSIFIER = {"classifier.block_out_channels": (32, 64), "classifier.attention": (False, True)}


def plan(budget: str) -> list[tuple[str, int]]:
    default = [arm for arm, setting in ARMS.items() if setting in SETTINGS]
    return [(arm, 0) for arm in PLANS.get(budget, default)]


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
def sample_with(workspace: Workspace, guide: str | None, with_classifier: bool) -> Callable[..., np.ndarray]:
    """The `sample` of the shared model (`measures.make_sample`), with a weaker model `guide` or the classifier."""
    model, params = load(workspace.shared_model())
    models = GuidanceModels()
    if with_classifier:
        models = GuidanceModels(classifier_for(classifier_of(workspace), model, params))
    elif guide is not None:
        recipe = balanced_recipe(model, 1, guidance=make_guidance(2.0)._replace(guide_model=guide))
        models = guidance_models(recipe, model, params)
    return measures.make_sample(workspace, model, params, BUDGETS[workspace.budget][1], models)


def first(workspace: Workspace) -> None:
    sample_with(workspace, None, workspace.budget != "cpu")
    measures.classifier_params(workspace)


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    setting = ARMS[arm]
    guidance = make_guidance(setting.guidance, setting.interval)._replace(parallel=setting.parallel)
    guide = f"{workspace.shared_model()}@{setting.step}" if setting.step else None
    if workspace.budget == "cpu":
        guidance = guidance._replace(guide_model=guide, guide_null=setting.null)
    else:  # one program for all: a scale of 0 is no guidance by the classifier
        classifier = str(classifier_of(workspace))
        guidance = guidance._replace(classifier=classifier, classifier_scale=setting.classifier_scale)
    images = sample_with(workspace, guide, workspace.budget != "cpu")(seed=seed, guidance=guidance)
    return setting._asdict() | measures.scores(workspace, images)


SCORES = {
    "FD-VGG16": (lambda row: row["cards"]["FD-VGG16"]["value"], 1),
    "precision": (lambda row: row["cards"]["precision-VGG16"]["value"], 2),
    "recall": (lambda row: row["cards"]["recall-VGG16"]["value"], 2),
    "classifier accuracy": (lambda row: row["classifier_accuracy"], 2),
}


CLASSIFIER_FD = {"FD in the classifier's features": (lambda row: row["classifier_fd"], 2)}


def table(rows: Rows) -> str:
    scored_twice = all("classifier_fd" in row for row in rows.values())  # later than budget minutes
    return tables.by_arm(rows, SCORES | CLASSIFIER_FD if scored_twice else SCORES)


def answer(rows: Rows) -> str:
    def of(name: str, arm: str) -> str:
        score, digits = SCORES[name]
        return f"{tables.mean(rows, arm, score):.{digits}f}"

    scales = [row["scale"] for row in rows.values() if row["method"] == FREE]
    none, most = (f"{FREE}, {end(scales):g}" for end in (min, max))
    best = min(tables.arms(rows), key=lambda arm: tables.mean(rows, arm, SCORES["FD-VGG16"][0]))
    text = (
        f"From no guidance to {most} the classifier accuracy goes from {of('classifier accuracy', none)} to "
        f"{of('classifier accuracy', most)}, recall from {of('recall', none)} to {of('recall', most)}. The lowest "
        f"FD has {best} ({of('FD-VGG16', best)}; without guidance {of('FD-VGG16', none)})."
    )
    if by_classifier := [row["scale"] for row in rows.values() if row["method"] == BY_CLASSIFIER]:
        arm = f"{BY_CLASSIFIER}, {max(by_classifier):g}"
        text += f" Classifier guidance alone ({arm}) reaches a classifier accuracy of {of('classifier accuracy', arm)}."
    return text


def plot(rows: Rows) -> Figure:
    """A panel for each score, a line for each method; below, samples at the lowest and highest scales."""
    ends = [arm for arm in (*SHOWN, *SHOWN_ON_MAIN_JOB) if any(row["arm"] == arm for row in rows.values())]
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
    Path(__file__).parent, "What does guidance improve, and at what cost?",
    plan, measure, table, answer, plot, first, budgets=budgets.BUDGETS,
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
