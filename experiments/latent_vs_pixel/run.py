"""Does diffusion on latents save compute and keep quality?

    python experiments/latent_vs_pixel/run.py [--budget=smoke|minutes|gpu]

The same UNet on pixels (f = 1) and on the latents of autoencoders with downsampling factor f = 2, 4 and 8 (Rombach
2022, figures 6 and 7), at 32 x 32 pixels: FD during training, after equal times and equal numbers of operations.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import measures, runner, scales, speed, strips, tables
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.pipeline.from_config import from_config
from ldm_jax.pipeline.load import load

SIZES = {"smoke": 8, "minutes": 32, "gpu": 32}  # pixels
FACTORS = {  # f -> channels of the autoencoder's blocks, of its latents
    1: None,
    2: ((32, 64), 4),
    4: ((16, 32, 64), 8),
    8: ((16, 32, 64, 64), 16),
}
BUDGETS = {  # steps of the autoencoders; seconds of the diffusion models; images
    "smoke": (4, 1, 5),
    "minutes": (600, 120, 250),
    "gpu": (5_000, 40, 5_000),
}
NUM_CHECKPOINTS = 16  # of a training run, at equal distances
SAMPLED = (2, 4, 8, 16)  # the checkpoints that are sampled
BACKWARD = 3  # a training step costs about as much as three forward passes


class Segment(NamedTuple):
    """The training between two checkpoints: steps, seconds and 10^12 floating-point operations."""

    steps: int
    seconds: float
    tflops: float


def plan(budget: str) -> list[tuple[str, int]]:
    return [(f"f = {factor}", 0) for factor in factors(budget)]


def factors(budget: str) -> tuple[int, ...]:
    return (1, 4) if budget == "smoke" else tuple(FACTORS)


def segments(workspace: Workspace) -> dict[int, Segment]:
    """Factor -> segment of its training, with the number of steps that fits into an equal time."""
    configs = {factor: workspace.config(fields(workspace, factor)) for factor in factors(workspace.budget)}
    names = {factor: f"latent_vs_pixel {factor}, images a second" for factor in configs}
    setups = {names[factor]: partial(speed.diffusion_setup, config) for factor, config in configs.items()}
    rates = speed.measure_speeds(
        workspace, {name: speed.images_per_second(workspace, make) for name, make in setups.items()}
    )
    by_factor = {}
    for factor, config in configs.items():
        tflops = BACKWARD * workspace.cached(f"latent_vs_pixel {factor}, flop an image", partial(flops, config)) / 1e12
        steps = workspace.steps_in(
            BUDGETS[workspace.budget][1] / NUM_CHECKPOINTS, rates[names[factor]], workspace.batch_size
        )
        images = steps * workspace.batch_size
        by_factor[factor] = Segment(steps, images / rates[names[factor]], images * tflops)
    return by_factor


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    factor, num = int(arm.removeprefix("f = ")), BUDGETS[workspace.budget][2]
    by_factor = segments(workspace)
    segment = by_factor[factor]
    # A constant learning rate, so that each checkpoint equals a shorter training run.
    changes = {"diffusion.steps": NUM_CHECKPOINTS * segment.steps, "diffusion.decay": "constant", "seed": seed}
    run = diffusion(
        workspace, factor, changes | {"checkpoint_every": segment.steps, "keep_checkpoints": NUM_CHECKPOINTS}
    )
    sample = measures.make_sample(workspace, *load(run), num)
    equal_compute = nearest_checkpoint(min(other.tflops for other in by_factor.values()) * NUM_CHECKPOINTS, segment)
    after = {}
    for number in sorted({*SAMPLED, equal_compute}):
        _, params = load(run, step=number * segment.steps)
        images = sample(seed=seed, params=params)
        after[str(number * segment.steps)] = {
            "training_seconds": number * segment.seconds,
            "training_tflops": number * segment.tflops,
            "equal": ["time"] * (number in SAMPLED) + ["operations"] * (number == equal_compute),
            "cards": measures.cards(workspace, images, size=SIZES[workspace.budget]),
            "images": strips.encode(images[:20]),
        }
    return {
        "factor": factor,
        "images_per_second": workspace.batch_size * segment.steps / segment.seconds,
        "after": after,
    }


def nearest_checkpoint(tflops: float, segment: Segment) -> int:
    """The number (1 to NUM_CHECKPOINTS) of the checkpoint nearest to this many 10^12 operations."""
    return min(max(round(tflops / segment.tflops), 1), NUM_CHECKPOINTS)


def fields(workspace: Workspace, factor: int) -> dict:
    """The config fields of a run on pixels (factor 1), or on the latents of this factor."""
    size = {"data.image_size": SIZES[workspace.budget]}
    if FACTORS[factor] is None:
        return size | {"autoencoder.type": "none"}
    channels, latent_channels = FACTORS[factor]
    return size | {
        "autoencoder.block_out_channels": (8,) * len(channels) if workspace.budget == "smoke" else channels,
        "autoencoder.latent_channels": latent_channels,
        "autoencoder.steps": BUDGETS[workspace.budget][0],
    }


def diffusion(workspace: Workspace, factor: int, changes: dict) -> Path:
    """The run folder of a diffusion model on pixels (factor 1), or on the latents of this factor."""
    changes = fields(workspace, factor) | changes
    if FACTORS[factor] is not None:
        only = fields(workspace, factor) | {"stages": ("autoencoder",)}
        changes |= {"autoencoder.checkpoint": str(workspace.train(f"latent_vs_pixel/autoencoder {factor}", only))}
    return workspace.train(f"latent_vs_pixel/f {factor}", changes)


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
    """Factor -> its checkpoints at times (`equal` = "time") or compute ("operations") that are equal for all."""
    return {
        row["factor"]: [state for state in by_time(row) if equal in state["equal"]]
        for row in sorted(rows.values(), key=lambda row: row["factor"])
    }


def by_time(row: Row) -> list[Row]:
    """The sampled checkpoints of a model, in the order of training time."""
    return sorted(row["after"].values(), key=lambda state: state["training_seconds"])


def table(rows: Rows) -> str:
    head = ["factor", "images per second", "training seconds", "training Tflop", "FD-VGG16", "precision", "recall"]
    body = []
    for row in rows.values():
        for state in by_time(row):
            precision, recall = (state["cards"][f"{name}-VGG16"]["value"] for name in ("precision", "recall"))
            costs = [f"{state['training_seconds']:.1f}", f"{state['training_tflops']:.2f}"]
            scores = [f"{fd(state):.1f}", f"{precision:.2f}", f"{recall:.2f}"]
            body.append([row["arm"], f"{row['images_per_second']:.0f}", *costs, *scores])
    return tables.table(head, body)


def answer(rows: Rows) -> str:
    last = {
        equal: {factor: checkpoints[-1] for factor, checkpoints in states(rows, equal).items()}
        for equal in ("time", "operations")
    }
    best = {equal: min(models, key=lambda f, models=models: fd(models[f])) for equal, models in last.items()}
    listed = {
        equal: ", ".join(f"f = {factor}: {fd(state):.1f}" for factor, state in models.items())
        for equal, models in last.items()
    }
    word = "Yes" if best["time"] != 1 else "Not here"
    seconds = max(state["training_seconds"] for state in last["time"].values())
    tflops = [state["training_tflops"] for state in last["operations"].values()]
    return (
        f"{word}: after {seconds:.0f} seconds of training f = {best['time']} has the lowest FD ({listed['time']}), "
        f"after {min(tflops):.2f} to {max(tflops):.2f} Tflop f = {best['operations']} ({listed['operations']})."
    )


def plot(rows: Rows) -> Figure:
    """FD over training time and compute; below, samples of the last checkpoints."""
    by_operations = states(rows, "operations")
    shown = {factor: checkpoints[-1]["images"] for factor, checkpoints in states(rows, "time").items()}
    height = strips.grid_height([{"": strip} for strip in shown.values()], 10)
    figure = plt.figure(figsize=(10, 3.8 + height), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.8, height])
    axes = above.subplots(1, 2, sharey=True)
    for row in sorted(rows.values(), key=lambda row: row["factor"]):
        factor, checkpoints = row["factor"], by_time(row)
        for axis, cost in zip(axes, ("training_seconds", "training_tflops")):
            fds = [fd(state) for state in checkpoints]
            (line,) = axis.plot([state[cost] for state in checkpoints], fds, "o-", label=f"f = {factor}")
        for state in by_operations[factor]:
            axes[1].plot(state["training_tflops"], fd(state), "s", ms=10, mfc="none", color=line.get_color())
    axes[0].set(xlabel="training seconds", ylabel="FD-VGG16")
    axes[1].set(xlabel="training Tflop (squares: about equal for all)")
    for axis in axes:
        scales.set_log_scale(axis)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    strips.plot_in(below, [{"": strip} for strip in shown.values()], [f"f = {factor}" for factor in shown])
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent,
    "Does diffusion on latents save compute and keep quality?",
    plan,
    measure,
    table,
    answer,
    plot,
    segments,
)

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
