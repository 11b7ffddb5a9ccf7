"""Is a diffusion transformer as good as a UNet, on latents and on pixels?

    python experiments/backbones/run.py [--budget=smoke|cpu]

The main job's UNet and a DiT (Peebles & Xie 2023), after equal times of training and after equal numbers of
operations; with the speed and the share of the peak of matrix products that each reaches.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import bars, measures, runner, speed, tables
from experiments.recipes import make_guidance
from experiments.runner import Experiment, Row, Rows, Workspace
from experiments.throughput.step_profile import peak
from ldm_jax.pipeline.load import load
from ldm_jax.runtime.operations import count_flops
from ldm_jax.sampling.recipe import solving_defaults

BACKBONES = {"UNet": {"denoiser": "unet"}, "DiT": {"denoiser": "dit", "diffusion.learning_rate": 4e-3}}
PATCH = 4  # pixels a side of the DiT's patches: 7 x 7 of them, as many as latents
SPACES = {"latents": {}, "pixels": {"autoencoder.type": "none", "dit.patch_size": PATCH}}
COSTS = ("time", "operations")  # equal for all arms
BUDGETS = {  # seeds, seconds of training, images
    "smoke": ((0,), 1, 10),
    "cpu": ((0, 1, 2), 600, 5_000),
}
SAMPLER, STEPS, GUIDANCE = "unipc", 12, make_guidance(1.75, (0.1, 0.9))  # classifier-free


class Cost(NamedTuple):
    """The cost of a network's training: images a second, and operations an image."""

    images_per_second: float
    flops: float


def plan(budget: str) -> list[tuple[str, int]]:
    return [
        (f"{network}, equal {cost}", seed)
        for seed in BUDGETS[budget][0]
        for network in networks(budget)
        for cost in COSTS
    ]


def networks(budget: str) -> dict[str, dict]:
    """ "UNet, latents" and so on -> its changes of the config."""
    spaces = {"latents": SPACES["latents"]} if budget == "smoke" else SPACES
    return {f"{name}, {space}": BACKBONES[name] | spaces[space] for name in BACKBONES for space in spaces}


def costs(workspace: Workspace) -> dict[str, Cost]:
    """Network -> the cost of its training, measured once."""
    configs = {name: workspace.config(changes) for name, changes in networks(workspace.budget).items()}
    names = {name: f"backbones {name}, images a second" for name in configs}
    timings = {
        names[name]: speed.images_per_second(workspace, partial(speed.diffusion_setup, config))
        for name, config in configs.items()
    }
    rates = speed.measure_speeds(workspace, timings)
    workspace.cached("backbones, peak of matrix products", peak)
    return {
        name: Cost(rates[names[name]], workspace.cached(f"backbones {name}, flop an image", partial(flops, config)))
        for name, config in configs.items()
    }


def flops(config: ConfigDict) -> float:
    """The operations of a training step for one image, of its products and convolutions."""
    setup = speed.diffusion_setup(config)
    batch = {name: rows[: setup.batch_size] for name, rows in setup.examples.items()}
    batch |= {"id": np.arange(setup.batch_size, dtype=np.int32), "step": np.int32(0)}

    jaxpr = jax.make_jaxpr(setup.stage.step)(setup.state, setup.frozen, batch, np.uint32(0))
    return count_flops(jaxpr.jaxpr) / setup.batch_size


def images(workspace: Workspace, network: str, cost: str) -> float:
    """The number of images to train on: by time in the seconds of the budget, else by the least operations of these."""
    by_network, seconds = costs(workspace), BUDGETS[workspace.budget][1]
    if cost == "time":
        return seconds * by_network[network].images_per_second
    least = min(each.images_per_second * each.flops for each in by_network.values())
    return seconds * least / by_network[network].flops


def first(workspace: Workspace) -> None:
    workspace.shared_autoencoder()
    measures.classifier_params(workspace)
    costs(workspace)


def run_folder(workspace: Workspace, network: str, steps: int, seed: int) -> Path:
    """The run folder of a network trained for this number of steps."""
    changes = networks(workspace.budget)[network] | {"diffusion.steps": steps, "seed": seed}
    train = workspace.train if "autoencoder.type" in changes else workspace.on_shared_latents
    return train(f"backbones/{network} {steps} {seed}", changes)


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    network, cost = arm.split(", equal ")
    images_per_second, flop = costs(workspace)[network]
    steps = workspace.steps_in(1.0, images(workspace, network, cost), workspace.batch_size)
    model, params = load(run_folder(workspace, network, steps, seed))
    sample = measures.make_sample(workspace, model, params, BUDGETS[workspace.budget][2])
    samples = sample(seed=seed, guidance=GUIDANCE, solving=solving_defaults(model, SAMPLER, STEPS))
    trained_on = steps * workspace.batch_size
    return {
        "network": network,
        "equal": cost,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params["denoiser"])),
        "steps": steps,
        "training_seconds": trained_on / images_per_second,
        "training_tflop": trained_on * flop / 1e12,
        "images_per_second": images_per_second,
        "gflop_per_image": flop / 1e9,
        "share_of_peak": images_per_second * flop / workspace.cached("backbones, peak of matrix products", peak),
    } | measures.scores(workspace, samples)


COLUMNS = measures.SCORES | {
    "parameters, millions": (lambda row: row["parameters"] / 1e6, 1),
    "steps": (lambda row: row["steps"], 0),
    "seconds of training": (lambda row: row["training_seconds"], 0),
    "Tflop of training": (lambda row: row["training_tflop"], 1),
    "images a second": (lambda row: row["images_per_second"], 0),
    "Gflop an image": (lambda row: row["gflop_per_image"], 3),
    "share of the peak": (lambda row: row["share_of_peak"], 2),
}


def table(rows: Rows) -> str:
    return tables.by_arm(rows, COLUMNS)


def answer(rows: Rows) -> str:
    """The FD of all networks, at equal times and at equal operations."""
    parts = []
    for cost in COSTS:
        arms = [arm for arm in tables.arms(rows) if arm.endswith(f"equal {cost}")]
        fds = ", ".join(
            f"{arm.removesuffix(f', equal {cost}')} {tables.mean(rows, arm, measures.fd):.1f}" for arm in arms
        )
        parts.append(f"after equal {cost} {fds}")
    return f"FD {'; '.join(parts)}."


def plot(rows: Rows) -> Figure:
    return bars.plot_arms(rows, lambda arm: arm.startswith("DiT"))


EXPERIMENT = Experiment(
    Path(__file__).parent, "Is a diffusion transformer as good as a UNet?",
    plan, measure, table, answer, plot, first, budgets=("smoke", "cpu"),
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
