"""How does the likelihood of diffusion compare with an autoregressive model and a flow, and which timesteps cost bits?

    python experiments/likelihood/run.py [--budget=smoke|minutes|gpu]

Bits per dimension of test images: the VLB of diffusion on pixels with fixed or learned variance (Nichol & Dhariwal
2021), a gated PixelCNN (exact) and a flow (exact for dequantized pixels).
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import budgets, runner, speed, tables
from experiments.baselines.models import SMALL, Model, Sizes, models
from experiments.baselines.training import num_params, sampling_params, test_bits, trained_for, training_setup
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.data.datasets import load_dataset
from ldm_jax.evaluation.likelihood import make_vlb
from ldm_jax.evaluation.scoring import condition_rows
from ldm_jax.pipeline.load import load
from ldm_jax.runtime.parallel import replicate

ON_PIXELS = {
    "autoencoder.type": "none",
    "diffusion.schedule": "cosine",
    "diffusion.prediction": "eps",
    "diffusion.weighting": "uniform",
}
DIFFUSION = {
    "diffusion, fixed variance": ON_PIXELS,
    "diffusion, learned variance": ON_PIXELS | {"diffusion.variance": "learned"},
}
OTHERS = ("PixelCNN", "flow")
SIZES = {  # smaller than in experiments/baselines: PixelCNN's network runs at each pixel and would train too slowly
    "smoke": SMALL,
    "minutes": Sizes(pixelcnn=(32, 8), flow=(96, 8)),
    "gpu": Sizes(),
}
VLB_BATCHES = {"smoke": 50, "minutes": 50, "gpu": 500}  # batch size of the VLB
BUDGETS = {  # seeds, seconds of training, test images
    "smoke": ((0,), 0.2, 50),
    "minutes": ((0, 1), 60, 500),
    "gpu": ((0, 1, 2), 12, 2_000),
}


def plan(budget: str) -> list[tuple[str, int]]:
    return [(arm, seed) for seed in BUDGETS[budget][0] for arm in (*DIFFUSION, *OTHERS)]


def rates(workspace: Workspace) -> dict[str, float]:
    """Arm -> images per second in training."""
    setups = {arm: partial(speed.diffusion_setup, workspace.config(changes_of(workspace, arm))) for arm in DIFFUSION}
    setups |= {arm: partial(training_setup, workspace, baseline_of(workspace, arm)) for arm in OTHERS}
    names = {arm: f"likelihood {arm}, images a second" for arm in setups}
    speeds = speed.measure_speeds(
        workspace, {names[arm]: speed.images_per_second(workspace, make) for arm, make in setups.items()}
    )
    return {arm: speeds[name] for arm, name in names.items()}


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    _, seconds, num_test = BUDGETS[workspace.budget]
    if arm in DIFFUSION:
        return {"training_seconds": seconds} | measure_diffusion(workspace, arm, seconds, num_test, seed)
    model = baseline_of(workspace, arm)
    state, steps = trained_for(workspace, f"likelihood {arm}", model, seconds, rates(workspace)[arm], seed)
    bits = test_bits(workspace, model, sampling_params(model, state), num_test)
    return {"training_seconds": seconds, "steps": steps, "parameters": num_params(state), "bits_per_dim": bits}


def baseline_of(workspace: Workspace, arm: str) -> Model:
    return models(SIZES[workspace.budget])[arm]


def changes_of(workspace: Workspace, arm: str) -> dict:
    """Config fields of diffusion on pixels."""
    size = {"data.image_size": 8} if workspace.budget == "smoke" else budgets.SMALLER_UNET
    return size | DIFFUSION[arm] | {"evaluation.batch_size": VLB_BATCHES[workspace.budget]}


def measure_diffusion(workspace: Workspace, arm: str, seconds: float, num_test: int, seed: int) -> Row:
    """Trains diffusion for `seconds`; its VLB, in total and by ranges of timesteps."""
    steps = workspace.steps_in(seconds, rates(workspace)[arm], workspace.batch_size)
    run = workspace.train(
        f"likelihood/{arm} {seed}", changes_of(workspace, arm) | {"diffusion.steps": steps, "seed": seed}
    )
    model, params = load(run)
    pixels = model.image_shape[0]
    test_set = load_dataset("fashion_mnist", f"test[:{num_test}]", data_dir=workspace.data_dir, image_size=pixels)
    cond, _ = condition_rows(model, test_set, test_set.arrays)
    examples = {"x": test_set.arrays["x"], "cond": cond}
    vlb = make_vlb(model, VLB_BATCHES[workspace.budget])(replicate(params), examples, seed)
    return {
        "steps": steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves([params["denoiser"], params["conditioning"]])),
        "bits_per_dim": vlb.total,
        "prior": vlb.prior,
        "bits_from": {str(first): bits for first, bits in zip(vlb.first, vlb.ranges)},
    }


def bits(row: Row) -> float:
    return row["bits_per_dim"]


def first_step(row: Row) -> float:
    return row["bits_from"]["0"]


def table(rows: Rows) -> str:
    body = []
    for arm in tables.arms(rows):
        seeds = [row for row in rows.values() if row["arm"] == arm]
        parts = (
            [[first_step(row) for row in seeds], [sum(row["bits_from"].values()) - first_step(row) for row in seeds]]
            if arm in DIFFUSION
            else []
        )
        body.append([
            arm, f"{seeds[0]['parameters'] / 1e6:.2f}", tables.mean_and_range([bits(row) for row in seeds], 2),
            *([tables.mean_and_range(part, 2) for part in parts] or ["-", "-"]),
        ])  # fmt: skip
    return tables.table(["model", "million parameters", "bits/dim", "bits/dim at t = 0", "bits/dim at t > 0"], body)


def answer(rows: Rows) -> str:
    means = {arm: tables.mean(rows, arm, bits) for arm in tables.arms(rows)}
    ranked = sorted(means, key=means.get)
    fixed, learned = DIFFUSION
    lower = "lowers" if means[learned] < means[fixed] else "does not lower"
    apart = max(tables.values(rows, learned, bits)) < min(tables.values(rows, fixed, bits))
    seeds = "the ranges of the seeds do not overlap" if apart else "the ranges of the seeds overlap"
    return (
        f"After {next(iter(rows.values()))['training_seconds']} seconds of training, in bits/dim: "
        f"{', '.join(f'{arm} {means[arm]:.2f}' for arm in ranked)}. Learning the variance {lower} the mean VLB "
        f"({seeds}); with fixed variance {tables.mean(rows, fixed, first_step):.2f} bits/dim are spent at t = 0, the "
        "step to the pixels."
    )


def plot(rows: Rows) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for place, arm in enumerate(tables.arms(rows)):
        values = tables.values(rows, arm, bits)
        axes[0].bar(place, np.mean(values), alpha=0.5)
        axes[0].plot([place] * len(values), values, "k.")
    axes[0].set_xticks(
        range(len(tables.arms(rows))), [arm.replace(", ", "\n") for arm in tables.arms(rows)], fontsize=8
    )
    axes[0].set(ylabel="bits/dim", title="test images (dots: seeds)")
    for arm in DIFFUSION:
        seeds = [row for row in rows.values() if row["arm"] == arm]
        edges = [*map(int, seeds[0]["bits_from"]), 1000]
        means = np.mean([list(row["bits_from"].values()) for row in seeds], axis=0) / np.diff(edges)
        axes[1].stairs(means, [max(edge, 0.5) for edge in edges], label=arm)
    axes[1].set(xlabel="t", ylabel="bits/dim per timestep", xscale="log", yscale="log", title="terms of the VLB")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent, "How does the likelihood of diffusion compare with an autoregressive model and a flow?",
    plan, measure, table, answer, plot, rates,
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
