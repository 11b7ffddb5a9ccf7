"""How probable does diffusion find real pictures, beside an autoregressive model and a flow? And where do the bits go?

    python experiments/likelihood/run.py [--budget=smoke|cpu|gpu]

Bits per dimension of test images: the variational bound of diffusion on pixels, with the variance of the reverse
steps fixed or learned (Nichol & Dhariwal 2021), a gated PixelCNN (exact) and a flow (exact, of dequantized pixels).
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import frame, speed, tables
from experiments.baselines.models import SMALL, Model, Sizes, models
from experiments.baselines.training import course, held_out_bits, sampling_params, size, trained_for
from experiments.frame import Experiment, Lab, Row, Rows
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
SIZES = {  # PixelCNN's network works at each pixel: as large as in experiments/baselines it would learn too slowly
    "smoke": SMALL,
    "cpu": Sizes(pixelcnn=(32, 8), flow=(96, 8)),
    "gpu": Sizes(),
}
VLB_BATCHES = {"smoke": 50, "cpu": 50, "gpu": 500}  # test images at a time
BUDGETS = {  # seeds, seconds of training, test images
    "smoke": ((0,), 0.2, 50),
    "cpu": ((0, 1), 60, 500),
    "gpu": ((0, 1, 2), 12, 2_000),
}


def plan(budget: str) -> list[tuple[str, int]]:
    return [(arm, seed) for seed in BUDGETS[budget][0] for arm in (*DIFFUSION, *OTHERS)]


def rates(lab: Lab) -> dict[str, float]:
    """Images a second in training, of each model."""
    courses = {arm: partial(speed.of_diffusion, lab.config(changes_of(lab, arm))) for arm in DIFFUSION}
    courses |= {arm: partial(course, lab, other(lab, arm)) for arm in OTHERS}
    notes = {arm: f"likelihood {arm}, images a second" for arm in courses}
    found = speed.measured(lab, {notes[arm]: speed.images_per_second(lab, make) for arm, make in courses.items()})
    return {arm: found[note] for arm, note in notes.items()}


def measure(lab: Lab, arm: str, seed: int) -> Row:
    _, seconds, tested = BUDGETS[lab.budget]
    if arm in DIFFUSION:
        return {"training_seconds": seconds} | of_diffusion(lab, arm, seconds, tested, seed)
    model = other(lab, arm)
    state, steps = trained_for(lab, f"likelihood {arm}", model, seconds, rates(lab)[arm], seed)
    bits = held_out_bits(lab, model, sampling_params(model, state), tested)
    return {"training_seconds": seconds, "steps": steps, "parameters": size(state), "bits_per_dim": bits}


def other(lab: Lab, arm: str) -> Model:
    return models(SIZES[lab.budget])[arm]


def changes_of(lab: Lab, arm: str) -> dict:
    """Of the config, for diffusion on pixels."""
    size = {"data.image_size": 8} if lab.budget == "smoke" else frame.SMALLER_UNET
    return size | DIFFUSION[arm] | {"evaluation.batch_size": VLB_BATCHES[lab.budget]}


def of_diffusion(lab: Lab, arm: str, seconds: float, tested: int, seed: int) -> Row:
    """The VLB, as a whole and by ranges of timesteps."""
    steps = lab.steps_in(seconds, rates(lab)[arm], lab.batch_size)
    run = lab.train(f"likelihood/{arm} {seed}", changes_of(lab, arm) | {"diffusion.steps": steps, "seed": seed})
    model, params = load(run)
    pixels = model.image_shape[0]
    test_set = load_dataset("fashion_mnist", f"test[:{tested}]", data_dir=lab.data_dir, image_size=pixels)
    cond, _ = condition_rows(model, test_set, test_set.arrays)
    examples = {"x": test_set.arrays["x"], "cond": cond}
    vlb = make_vlb(model, VLB_BATCHES[lab.budget])(replicate(params), examples, seed)
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
        some = [row for row in rows.values() if row["arm"] == arm]
        parts = (
            [[first_step(row) for row in some], [sum(row["bits_from"].values()) - first_step(row) for row in some]]
            if arm in DIFFUSION
            else []
        )
        body.append([
            arm, f"{some[0]['parameters'] / 1e6:.2f}", tables.spread([bits(row) for row in some], 2),
            *([tables.spread(part, 2) for part in parts] or ["-", "-"]),
        ])  # fmt: skip
    return tables.table(["model", "million parameters", "bits/dim", "of them at t = 0", "at all other t"], body)


def answer(rows: Rows) -> str:
    found = {arm: tables.mean(rows, arm, bits) for arm in tables.arms(rows)}
    ranked = sorted(found, key=found.get)
    fixed, learned = DIFFUSION
    helps = "lowers" if found[learned] < found[fixed] else "does not lower"
    return (
        f"After {next(iter(rows.values()))['training_seconds']} seconds of training, in bits/dim: "
        f"{', '.join(f'{arm} {found[arm]:.2f}' for arm in ranked)}. Learning the variance {helps} the bound; of the "
        f"fixed one's {tables.mean(rows, fixed, first_step):.2f} go to the last step, from t = 0 to the pixels."
    )


def draw(rows: Rows) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for place, arm in enumerate(tables.arms(rows)):
        found = tables.values(rows, arm, bits)
        axes[0].bar(place, np.mean(found), alpha=0.5)
        axes[0].plot([place] * len(found), found, "k.")
    axes[0].set_xticks(
        range(len(tables.arms(rows))), [arm.replace(", ", "\n") for arm in tables.arms(rows)], fontsize=8
    )
    axes[0].set(ylabel="bits/dim", title="test pictures (dots: seeds)")
    for arm in DIFFUSION:
        some = [row for row in rows.values() if row["arm"] == arm]
        edges = [*map(int, some[0]["bits_from"]), 1000]
        means = np.mean([list(row["bits_from"].values()) for row in some], axis=0) / np.diff(edges)
        axes[1].stairs(means, [max(edge, 0.5) for edge in edges], label=arm)
    axes[1].set(xlabel="t", ylabel="bits/dim of one timestep", xscale="log", yscale="log", title="where the bits go")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent, "How probable does diffusion find real pictures, beside an autoregressive model and a flow?",
    plan, measure, table, answer, draw, rates,
)  # fmt: skip

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
