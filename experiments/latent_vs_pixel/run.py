"""Does diffusion on latents save compute and keep quality?

    python experiments/latent_vs_pixel/run.py [--budget=smoke|cpu|gpu]

The same UNet on pixels (f = 1) and on the latents of autoencoders that make pictures f = 2, 4 and 8 times smaller
(Rombach 2022, figures 6 and 7), trained for equal times and with equal numbers of operations, at 32 x 32 pixels.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import frame, measures, scales, speed, strips, tables
from experiments.frame import Experiment, Lab, Row, Rows
from ldm_jax import builders, trained

SIZES = {"smoke": 8, "cpu": 32, "gpu": 32}  # pixels
FACTORS = {  # f -> the autoencoder's channels, and those of its latents
    1: None,
    2: ((32, 64), 4),
    4: ((16, 32, 64), 8),
    8: ((16, 32, 64, 64), 16),
}
BUDGETS = {  # steps of the autoencoders; seconds of the diffusion models; their Tflop, if equal; pictures
    "smoke": (4, (1,), 1e-4, 5),
    "cpu": (600, (10, 20, 40), 1.0, 250),
    "gpu": (5_000, (10, 20, 40), 100.0, 5_000),
}
EQUAL = ("time", "operations")
BACKWARD = 3  # a training step costs about three forward passes


class Arm(NamedTuple):
    """How much smaller the pictures become, and what is spent on training: one of the two."""

    factor: int
    seconds: float | None = None
    tflops: float | None = None


def arms(budget: str) -> dict[str, Arm]:
    _, times, tflops, _ = BUDGETS[budget]
    factors = (1, 4) if budget == "smoke" else tuple(FACTORS)
    by_time = {f"f = {factor}, {seconds} s": Arm(factor, seconds=seconds) for factor in factors for seconds in times}
    by_operations = {f"f = {factor}, {tflops:g} Tflop": Arm(factor, tflops=tflops) for factor in factors}
    return by_time | (by_operations if budget != "smoke" else dict(list(by_operations.items())[-1:]))


def plan(budget: str) -> list[tuple[str, int]]:
    return [(name, 0) for name in arms(budget)]


def rates(lab: Lab) -> dict[int, float]:
    """Images a second in training, for each factor."""
    factors = dict.fromkeys(arm.factor for arm in arms(lab.budget).values())
    courses = {factor: partial(speed.of_diffusion, lab.config(fields(lab, factor))) for factor in factors}
    notes = {factor: f"latent_vs_pixel {factor}, images a second" for factor in factors}
    found = speed.measured(lab, {notes[factor]: speed.images_per_second(lab, make) for factor, make in courses.items()})
    return {factor: found[note] for factor, note in notes.items()}


def measure(lab: Lab, arm: str, seed: int) -> Row:
    factor, seconds, tflops = arms(lab.budget)[arm]
    per_step = BACKWARD * flops(lab.config(fields(lab, factor))) * lab.batch_size / 1e12
    images_per_second = rates(lab)[factor]
    if seconds is None:
        steps = max(1, round(tflops / per_step))
    else:
        steps = lab.steps_in(seconds, images_per_second, lab.batch_size)
    model = trained.load(diffusion(lab, factor, arm, {"diffusion.steps": steps, "seed": seed}))
    images = measures.drawing(lab, model, BUDGETS[lab.budget][3])(seed=seed)
    return {
        "factor": factor,
        "equal": "time" if tflops is None else "operations",
        "training_seconds": steps * lab.batch_size / images_per_second,
        "training_tflops": steps * per_step,
        "images_per_second": images_per_second,
        "steps": steps,
        "cards": measures.cards(lab, images, size=SIZES[lab.budget]),
        "pictures": strips.packed(images[:20]),
    }


def fields(lab: Lab, factor: int) -> dict:
    """Those of the config of a run on pixels, or on the latents of this factor."""
    size = {"data.image_size": SIZES[lab.budget]}
    if FACTORS[factor] is None:
        return size | {"autoencoder.kind": "none"}
    channels, latent_channels = FACTORS[factor]
    return size | {
        "autoencoder.block_out_channels": (8,) * len(channels) if lab.budget == "smoke" else channels,
        "autoencoder.latent_channels": latent_channels,
        "autoencoder.steps": BUDGETS[lab.budget][0],
    }


def diffusion(lab: Lab, factor: int, name: str, changes: dict) -> Path:
    """A run on pixels, or on the latents of this factor, whose autoencoder serves for all."""
    changes = fields(lab, factor) | changes
    if FACTORS[factor] is not None:
        only = fields(lab, factor) | {"stages": ("autoencoder",)}
        changes |= {"autoencoder.checkpoint": str(lab.train(f"latent_vs_pixel/autoencoder {factor}", only))}
    return lab.train(f"latent_vs_pixel/{name}", changes)


def flops(config: ConfigDict) -> float:
    """Floating-point operations of one forward pass of the UNet on one picture, as XLA counts them."""
    unet, size = builders.build_unet(config), config.unet
    z = jax.ShapeDtypeStruct((1, *builders.latent_shape(config)), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    context = jax.ShapeDtypeStruct((1, size.context_tokens, size.context_dim), jnp.float32)
    params = jax.eval_shape(unet.init, jax.random.key(0), z, t, context)
    return float(jax.jit(unet.apply).lower(params, z, t, context).cost_analysis()["flops"])


def fd(row: Row) -> float:
    return row["cards"]["FD-VGG16"]["value"]


def by_factor(rows: Rows, equal: str) -> dict[int, list[Row]]:
    """Factor -> its rows with equal time or operations, in the order of what was spent."""
    found: dict[int, list[Row]] = {}
    for row in sorted(rows.values(), key=lambda row: row["training_seconds"]):
        if row["equal"] == equal:
            found.setdefault(row["factor"], []).append(row)
    return dict(sorted(found.items()))


def table(rows: Rows) -> str:
    columns = {
        "FD-VGG16": (fd, 1),
        "precision": (lambda row: row["cards"]["precision-VGG16"]["value"], 2),
        "recall": (lambda row: row["cards"]["recall-VGG16"]["value"], 2),
        "images a second": (lambda row: row["images_per_second"], 0),
        "seconds of training": (lambda row: row["training_seconds"], 0),
        "Tflop of training": (lambda row: row["training_tflops"], 1),
    }
    return tables.by_arm(rows, columns)


def answer(rows: Rows) -> str:
    longest = {equal: {factor: some[-1] for factor, some in by_factor(rows, equal).items()} for equal in EQUAL}
    best = {equal: min(some, key=lambda factor, some=some: fd(some[factor])) for equal, some in longest.items()}
    listed = {
        equal: ", ".join(f"f = {factor}: {fd(row):.1f}" for factor, row in some.items())
        for equal, some in longest.items()
    }
    word = "It does" if best["time"] != 1 else "Not here"
    spent = {equal: next(iter(some.values())) for equal, some in longest.items()}
    return (
        f"{word}: after {spent['time']['training_seconds']:.0f} seconds of training f = {best['time']} is nearest to "
        f"the data (FD {listed['time']}), and after {spent['operations']['training_tflops']:.1f} Tflop f = "
        f"{best['operations']} ({listed['operations']})."
    )


def draw(rows: Rows) -> Figure:
    """FD over both kinds of effort; below what was drawn after the longest time."""
    shown = {factor: some[-1]["pictures"] for factor, some in by_factor(rows, "time").items()}
    height = strips.height_of([{"": strip} for strip in shown.values()], 10)
    figure = plt.figure(figsize=(10, 3.8 + height), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.8, height])
    axes = above.subplots(1, 2, sharey=True)
    for factor, some in by_factor(rows, "time").items():
        equal = by_factor(rows, "operations").get(factor, [])
        for axis, over in zip(axes, ("training_seconds", "training_tflops")):
            (line,) = axis.plot(
                [row[over] for row in some], [fd(row) for row in some], marker="o", label=f"f = {factor}"
            )
            axis.plot([row[over] for row in equal], [fd(row) for row in equal], "s", mfc="none", color=line.get_color())
    axes[0].set(xlabel="seconds of training", ylabel="FD-VGG16")
    axes[1].set(xlabel="Tflop of training (squares: equal for all)")
    for axis in axes:
        scales.logarithmic(axis)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    strips.draw_in(below, [{"": strip} for strip in shown.values()], [f"f = {factor}" for factor in shown])
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent,
    "Does diffusion on latents save compute and keep quality?",
    plan,
    measure,
    table,
    answer,
    draw,
    rates,
)

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
