"""Does diffusion on latents save compute and keep quality?

    python experiments/latent_vs_pixel/run.py [--budget=smoke|cpu|gpu]

The same UNet on pixels (f = 1) and on the latents of autoencoders that make images f = 2, 4 and 8 times smaller
(Rombach 2022, figures 6 and 7), at 32 x 32 pixels: FD on the way, after equal times and equal numbers of operations.
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
from ldm_jax.pipeline.from_config import from_config
from ldm_jax.pipeline.load import load

SIZES = {"smoke": 8, "cpu": 32, "gpu": 32}  # pixels
FACTORS = {  # f -> the autoencoder's channels, and those of its latents
    1: None,
    2: ((32, 64), 4),
    4: ((16, 32, 64), 8),
    8: ((16, 32, 64, 64), 16),
}
BUDGETS = {  # steps of the autoencoders; seconds of the diffusion models; images
    "smoke": (4, 1, 5),
    "cpu": (600, 120, 250),
    "gpu": (5_000, 40, 5_000),
}
PARTS = 16  # of a training, each of which leaves a checkpoint
SHOWN = (2, 4, 8, 16)  # after how many of them the model is sampled
BACKWARD = 3  # a training step costs about three forward passes


class Effort(NamedTuple):
    """What a part of the training of a model is."""

    steps: int
    seconds: float
    tflops: float


def plan(budget: str) -> list[tuple[str, int]]:
    return [(f"f = {factor}", 0) for factor in factors(budget)]


def factors(budget: str) -> tuple[int, ...]:
    return (1, 4) if budget == "smoke" else tuple(FACTORS)


def efforts(lab: Lab) -> dict[int, Effort]:
    """A part of the training on each factor, of as many steps as fit into an equal time."""
    configs = {factor: lab.config(fields(lab, factor)) for factor in factors(lab.budget)}
    notes = {factor: f"latent_vs_pixel {factor}, images a second" for factor in configs}
    courses = {notes[factor]: partial(speed.of_diffusion, config) for factor, config in configs.items()}
    rates = speed.measured(lab, {note: speed.images_per_second(lab, make) for note, make in courses.items()})
    found = {}
    for factor, config in configs.items():
        tflops = BACKWARD * lab.once(f"latent_vs_pixel {factor}, flop an image", partial(flops, config)) / 1e12
        steps = lab.steps_in(BUDGETS[lab.budget][1] / PARTS, rates[notes[factor]], lab.batch_size)
        images = steps * lab.batch_size
        found[factor] = Effort(steps, images / rates[notes[factor]], images * tflops)
    return found


def measure(lab: Lab, arm: str, seed: int) -> Row:
    factor, num = int(arm.removeprefix("f = ")), BUDGETS[lab.budget][2]
    parts = efforts(lab)
    part = parts[factor]
    # A constant learning rate, so that every checkpoint is what a training that ended there would have come to.
    changes = {"diffusion.steps": PARTS * part.steps, "diffusion.decay": "constant", "seed": seed}
    run = diffusion(lab, factor, changes | {"checkpoint_every": part.steps, "keep_checkpoints": PARTS})
    sample = measures.sampling(lab, *load(run), num)
    alike = nearest_part(min(other.tflops for other in parts.values()) * PARTS, part)
    after = {}
    for done in sorted({*SHOWN, alike}):
        _, params = load(run, step=done * part.steps)
        images = sample(seed=seed, params=params)
        after[str(done * part.steps)] = {
            "training_seconds": done * part.seconds,
            "training_tflops": done * part.tflops,
            "equal": ["time"] * (done in SHOWN) + ["operations"] * (done == alike),
            "cards": measures.cards(lab, images, size=SIZES[lab.budget]),
            "pictures": strips.packed(images[:20]),
        }
    return {"factor": factor, "images_per_second": lab.batch_size * part.steps / part.seconds, "after": after}


def nearest_part(tflops: float, part: Effort) -> int:
    """After how many parts about so many operations have been made."""
    return min(max(round(tflops / part.tflops), 1), PARTS)


def fields(lab: Lab, factor: int) -> dict:
    """Those of the config of a run on pixels, or on the latents of this factor."""
    size = {"data.image_size": SIZES[lab.budget]}
    if FACTORS[factor] is None:
        return size | {"autoencoder.type": "none"}
    channels, latent_channels = FACTORS[factor]
    return size | {
        "autoencoder.block_out_channels": (8,) * len(channels) if lab.budget == "smoke" else channels,
        "autoencoder.latent_channels": latent_channels,
        "autoencoder.steps": BUDGETS[lab.budget][0],
    }


def diffusion(lab: Lab, factor: int, changes: dict) -> Path:
    """A run on pixels, or on the latents of this factor."""
    changes = fields(lab, factor) | changes
    if FACTORS[factor] is not None:
        only = fields(lab, factor) | {"stages": ("autoencoder",)}
        changes |= {"autoencoder.checkpoint": str(lab.train(f"latent_vs_pixel/autoencoder {factor}", only))}
    return lab.train(f"latent_vs_pixel/f {factor}", changes)


def flops(config: ConfigDict) -> float:
    """Floating-point operations of one forward pass of the UNet on one image, as XLA counts them."""
    model, size = from_config(config, ()), config.unet
    unet, z = model.denoiser, jax.ShapeDtypeStruct((1, *model.latent_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    context = jax.ShapeDtypeStruct((1, size.context_tokens, size.context_dim), jnp.float32)
    params = jax.eval_shape(unet.init, jax.random.key(0), z, t, context)
    return float(jax.jit(unet.apply).lower(params, z, t, context).cost_analysis()["flops"])


def fd(state: Row) -> float:
    return state["cards"]["FD-VGG16"]["value"]


def states(rows: Rows, equal: str) -> dict[int, list[Row]]:
    """Factor -> its model after the same times as the others, or after about as many operations."""
    return {
        row["factor"]: [state for state in on_the_way(row) if equal in state["equal"]]
        for row in sorted(rows.values(), key=lambda row: row["factor"])
    }


def on_the_way(row: Row) -> list[Row]:
    """A model in the order of what had been spent on it."""
    return sorted(row["after"].values(), key=lambda state: state["training_seconds"])


def table(rows: Rows) -> str:
    head = ["factor", "images a second", "seconds of training", "Tflop of training", "FD-VGG16", "precision", "recall"]
    body = []
    for row in rows.values():
        for state in on_the_way(row):
            precision, recall = (state["cards"][f"{name}-VGG16"]["value"] for name in ("precision", "recall"))
            spent = [f"{state['training_seconds']:.1f}", f"{state['training_tflops']:.2f}"]
            scores = [f"{fd(state):.1f}", f"{precision:.2f}", f"{recall:.2f}"]
            body.append([row["arm"], f"{row['images_per_second']:.0f}", *spent, *scores])
    return tables.table(head, body)


def answer(rows: Rows) -> str:
    last = {
        equal: {factor: some[-1] for factor, some in states(rows, equal).items()} for equal in ("time", "operations")
    }
    best = {equal: min(some, key=lambda factor, some=some: fd(some[factor])) for equal, some in last.items()}
    listed = {
        equal: ", ".join(f"f = {factor}: {fd(state):.1f}" for factor, state in some.items())
        for equal, some in last.items()
    }
    word = "It does" if best["time"] != 1 else "Not here"
    seconds = max(state["training_seconds"] for state in last["time"].values())
    tflops = [state["training_tflops"] for state in last["operations"].values()]
    return (
        f"{word}: after {seconds:.0f} seconds of training f = {best['time']} is nearest to the data (FD "
        f"{listed['time']}), and after {min(tflops):.2f} to {max(tflops):.2f} Tflop f = {best['operations']} "
        f"({listed['operations']})."
    )


def draw(rows: Rows) -> Figure:
    """FD over both kinds of effort; below the samples after the longest time."""
    by_operations = states(rows, "operations")
    shown = {factor: some[-1]["pictures"] for factor, some in states(rows, "time").items()}
    height = strips.height_of([{"": strip} for strip in shown.values()], 10)
    figure = plt.figure(figsize=(10, 3.8 + height), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.8, height])
    axes = above.subplots(1, 2, sharey=True)
    for row in sorted(rows.values(), key=lambda row: row["factor"]):
        factor, some = row["factor"], on_the_way(row)
        for axis, spent in zip(axes, ("training_seconds", "training_tflops")):
            found = [fd(state) for state in some]
            (line,) = axis.plot([state[spent] for state in some], found, "o-", label=f"f = {factor}")
        for state in by_operations[factor]:
            axes[1].plot(state["training_tflops"], fd(state), "s", ms=10, mfc="none", color=line.get_color())
    axes[0].set(xlabel="seconds of training", ylabel="FD-VGG16")
    axes[1].set(xlabel="Tflop of training (squares: about equal for all)")
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
    efforts,
)

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
