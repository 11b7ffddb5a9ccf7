"""Does diffusion on latents save compute and keep quality?

    python experiments/latent_vs_pixel/run.py [--budget=smoke|cpu|gpu]

The same UNet on pixels (f = 1) and on the latents of autoencoders that make pictures f = 2, 4 and 8 times smaller
(Rombach 2022, figures 6 and 7), trained for equal times, at 32 x 32 pixels. Also over the operations spent.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments import frame, measures, tables
from experiments.frame import Experiment, Lab, Row, Rows
from ldm_jax import builders, trained

SIZE = 32
FACTORS = {  # f -> the autoencoder's channels, and those of its latents
    1: None,
    2: ((32, 64), 4),
    4: ((16, 32, 64), 8),
    8: ((16, 32, 64, 64), 16),
}
BUDGETS = {  # steps of the autoencoders, seconds of the diffusion models, pictures
    "smoke": (4, (1,), 10),
    "cpu": (1_500, (10, 20, 40), 250),
    "gpu": (20_000, (120, 360, 1_080), 10_000),
}
RATE_STEPS = {"smoke": 4, "cpu": 64, "gpu": 600}  # of the run that finds out how many steps fit into a second
BACKWARD = 3  # a training step costs about three forward passes


def arm_of(factor: int, seconds: int) -> str:
    return f"f = {factor}, {seconds} s"


def plan(budget: str) -> list[tuple[str, int]]:
    factors = (1, 4) if budget == "smoke" else FACTORS
    return [(arm_of(factor, seconds), 0) for factor in factors for seconds in BUDGETS[budget][1]]


def measure(lab: Lab, arm: str, seed: int) -> Row:
    factor, seconds = next((f, s) for f in FACTORS for s in BUDGETS[lab.budget][1] if arm_of(f, s) == arm)
    images_per_second = rate(lab, factor)
    steps = lab.steps_in(seconds, images_per_second, lab.batch_size)
    model = trained.load(diffusion(lab, factor, arm, {"diffusion.steps": steps, "seed": seed}))
    images = measures.drawing(model, BUDGETS[lab.budget][2])(seed=seed)
    per_image = flops(model)
    return {
        "factor": factor,
        "training_seconds": seconds,
        "images_per_second": images_per_second,
        "steps": steps,
        "forward_flops_per_image": per_image,
        "training_tflops": BACKWARD * per_image * steps * lab.batch_size / 1e12,
        "cards": measures.cards(lab, images, size=SIZE),
    }


def batch_size(lab: Lab) -> int:
    return 8 if lab.budget == "smoke" else 64


def diffusion(lab: Lab, factor: int, name: str, changes: dict) -> Path:
    """A run on pixels, or on the latents of this factor."""
    changes = {"data.image_size": SIZE} | changes
    if FACTORS[factor] is None:
        return lab.train(f"latent_vs_pixel/{name}", {"autoencoder.kind": "none"} | changes)
    channels, latent_channels = FACTORS[factor]
    smoke = lab.budget == "smoke"
    autoencoder = {
        "autoencoder.block_out_channels": (8,) * len(channels) if smoke else channels,
        "autoencoder.latent_channels": latent_channels,
        "autoencoder.steps": BUDGETS[lab.budget][0],
    }
    first = lab.train(
        f"latent_vs_pixel/autoencoder {factor}",
        autoencoder | {"data.image_size": SIZE, "stages": ("autoencoder",)},
    )
    return lab.train(f"latent_vs_pixel/{name}", autoencoder | changes | {"autoencoder.checkpoint": str(first)})


def rate(lab: Lab, factor: int) -> float:
    """Images a second in training, by a short run."""
    steps = RATE_STEPS[lab.budget]
    changes = {"diffusion.steps": steps, "log_every": steps // 4}
    name = f"rate {factor}"
    return lab.once(
        f"latent_vs_pixel/{name}",
        lambda: frame.images_per_second(diffusion(lab, factor, name, changes), "diffusion", lab.batch_size),
    )


def flops(model: trained.Trained) -> float:
    """Floating-point operations of one forward pass of the UNet on one picture, as XLA counts them."""
    unet, fields = builders.build_unet(model.config), model.config.unet
    z = jnp.zeros((1, *builders.latent_shape(model.config)))
    context = jnp.zeros((1, fields.context_tokens, fields.context_dim))
    call = jax.jit(lambda params: unet.apply({"params": params}, z, jnp.zeros(1, jnp.int32), context=context))
    return float(call.lower(model.params["unet"]).cost_analysis()["flops"])


def fd(row: Row) -> float:
    return row["cards"]["FD-VGG16"]["value"]


def by_factor(rows: Rows) -> dict[int, list[Row]]:
    """Factor -> its rows in the order of their training times."""
    found: dict[int, list[Row]] = {}
    for row in sorted(rows.values(), key=lambda row: row["training_seconds"]):
        found.setdefault(row["factor"], []).append(row)
    return dict(sorted(found.items()))


def table(rows: Rows) -> str:
    columns = {
        "FD-VGG16": (fd, 1),
        "precision": (lambda row: row["cards"]["precision-VGG16"]["value"], 2),
        "recall": (lambda row: row["cards"]["recall-VGG16"]["value"], 2),
        "images a second": (lambda row: row["images_per_second"], 0),
        "Tflop in training": (lambda row: row["training_tflops"], 1),
    }
    return tables.by_arm(rows, columns)


def answer(rows: Rows) -> str:
    longest = {factor: some[-1] for factor, some in by_factor(rows).items()}
    best = min(longest, key=lambda factor: fd(longest[factor]))
    others = ", ".join(f"f = {factor}: {fd(row):.1f}" for factor, row in longest.items() if factor != best)
    word = "It does" if best != 1 else "Not here"
    return (
        f"{word}: after {longest[best]['training_seconds']} seconds of training f = {best} is nearest to the data (FD "
        f"{fd(longest[best]):.1f}; {others})."
    )


def draw(rows: Rows) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for factor, some in by_factor(rows).items():
        for axis, over in zip(axes, ("training_seconds", "training_tflops")):
            axis.plot([row[over] for row in some], [fd(row) for row in some], marker="o", label=f"f = {factor}")
    axes[0].set(xlabel="seconds of training", ylabel="FD-VGG16", xscale="log", yscale="log")
    axes[1].set(xlabel="Tflop of training", xscale="log")
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.tight_layout()
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent,
    "Does diffusion on latents save compute and keep quality?",
    plan,
    measure,
    table,
    answer,
    draw,
)

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
