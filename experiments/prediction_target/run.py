"""Does predicting the noise work better than predicting the image?

    python experiments/prediction_target/run.py [--budget=smoke|minutes|gpu]

The UNet predicts eps, z0 or v = alpha eps - sigma z0 (Salimans & Ho 2022), with uniform or min-SNR loss weights (Hang
2023). Linear schedule and ancestral sampling, as in the original claim (Ho 2020).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments import measures, runner, tables
from experiments.recipes import make_guidance
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.pipeline.load import load
from ldm_jax.sampling.recipe import solving_defaults

TARGETS = {"eps": "eps", "z0": "z0", "v": "v"}
WEIGHTINGS = {"uniform": "uniform", "min-SNR": "min_snr"}
ARMS = {f"{target}, {name}": (target, weighting) for target in TARGETS for name, weighting in WEIGHTINGS.items()}
CALLS = 50
BUDGETS = {  # seeds, training steps, images
    "smoke": ((0,), 2, 10),
    "minutes": ((0, 1, 2), 1_000, 250),
    "gpu": ((0, 1, 2), 2_500, 5_000),
}


def plan(budget: str) -> list[tuple[str, int]]:
    arms = ("eps, uniform", "z0, uniform") if budget == "smoke" else ARMS
    return [(arm, seed) for seed in BUDGETS[budget][0] for arm in arms]


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    (target, weighting), (_, steps, num) = ARMS[arm], BUDGETS[workspace.budget]
    changes = {"diffusion.prediction": target, "diffusion.weighting": weighting, "diffusion.schedule": "linear"}
    changes |= {"diffusion.steps": steps, "seed": seed}
    model, params = load(workspace.on_shared_latents(f"prediction_target/{arm} {seed}", changes))
    sample = measures.make_sample(workspace, model, params, num)
    images = sample(seed=seed, guidance=make_guidance(1.5), solving=solving_defaults(model, "ddpm", CALLS))
    return {"target": target, "weighting": weighting, "steps": steps, "cards": measures.cards(workspace, images)}


def fd(row: Row) -> float:
    return row["cards"]["FD-VGG16"]["value"]


def table(rows: Rows) -> str:
    scores = {"FD-VGG16": 1, "precision-VGG16": 2, "recall-VGG16": 2}
    columns = {name: (lambda row, name=name: row["cards"][name]["value"], digits) for name, digits in scores.items()}
    return tables.by_arm(rows, columns)


def answer(rows: Rows) -> str:
    means = {arm: tables.mean(rows, arm, fd) for arm in tables.arms(rows)}
    ranked = sorted(means, key=means.get)
    lowest, highest = (f"{arm} ({means[arm]:.1f})" for arm in (ranked[0], ranked[-1]))
    extremes = f"Lowest FD: {lowest}, highest: {highest}."
    noise, image = (means.get(f"{target}, uniform") for target in ("eps", "z0"))
    if noise is None or image is None:
        return extremes
    word = "Yes" if noise < image else "No"
    return f"{word}: with uniform weights eps-prediction has FD {noise:.1f}, z0-prediction {image:.1f}. {extremes}"


def plot(rows: Rows) -> Figure:
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for place, arm in enumerate(tables.arms(rows)):
        fds = tables.values(rows, arm, fd)
        axis.bar(place, tables.mean(rows, arm, fd), color="C0" if "uniform" in arm else "C1", alpha=0.5)
        axis.plot([place] * len(fds), fds, "k.")
    axis.set_xticks(range(len(tables.arms(rows))), tables.arms(rows), rotation=15)
    axis.set(ylabel="FD-VGG16", title="Prediction target and loss weights (dots: seeds)")
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent, "Does predicting the noise work better than predicting the image?",
    plan, measure, table, answer, plot, Workspace.shared_autoencoder,
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
