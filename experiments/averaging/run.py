"""Which average of the parameters gives the best samples?

    python experiments/averaging/run.py [--budget=smoke|cpu|gpu]

The main job's diffusion model with two power function averages of its parameters (Karras 2024), by a learning rate that
decays by a cosine and by a constant one: samples of averages of many lengths, reconstructed after the training, and of
the exponential moving average of the config.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import measures, runner, scales, strips, tables
from experiments.recipes import make_guidance
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.pipeline.load import load
from ldm_jax.sampling.recipe import solving_defaults

DECAYS = ("cosine", "constant")  # of the learning rate
EMA = "EMA"  # of the config
STORED = (0.05, 0.1)  # sigma_rel of the averages that the training keeps
BUDGETS = {  # seeds, training steps, steps between snapshots, sigma_rel, images
    "smoke": ((0,), 4, 2, STORED, 10),
    "cpu": ((0, 1, 2), 5_800, 200, (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25), 5_000),
    "gpu": ((0, 1, 2), 8_000, 200, (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25), 5_000),
}
SAMPLER, STEPS, GUIDANCE = "unipc", 12, make_guidance(1.75, (0.1, 0.9))  # classifier-free


def arm_name(decay: str, sigma_rel: float | None) -> str:
    return f"{decay}, {EMA if sigma_rel is None else f'sigma_rel {sigma_rel:g}'}"


def arms_of(budget: str) -> dict[str, tuple[str, float | None]]:
    """Arm -> decay of the learning rate, and length of the average; None = the EMA."""
    lengths = (None, *BUDGETS[budget][3])
    return {arm_name(decay, sigma_rel): (decay, sigma_rel) for decay in DECAYS for sigma_rel in lengths}


def plan(budget: str) -> list[tuple[str, int]]:
    return [(arm, seed) for seed in BUDGETS[budget][0] for arm in arms_of(budget)]


def run_folder(workspace: Workspace, decay: str, seed: int) -> Path:
    """The trained run of a learning rate schedule, with the snapshots of its averages."""
    _, steps, every, _, _ = BUDGETS[workspace.budget]
    averages = {"diffusion.ema_sigma_rels": STORED, "diffusion.ema_snapshot_every": every}
    changes = {"diffusion.steps": steps, "diffusion.decay": decay, "seed": seed}
    return workspace.on_shared_latents(f"averaging/{decay} {seed}", changes | averages)


def first(workspace: Workspace) -> None:
    workspace.shared_autoencoder()
    measures.classifier_params(workspace)


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    decay, sigma_rel = arms_of(workspace.budget)[arm]
    num = BUDGETS[workspace.budget][-1]
    model, params = load(run_folder(workspace, decay, seed), ema_sigma_rel=sigma_rel)
    sample = measures.make_sample(workspace, model, params, num)
    images = sample(seed=seed, guidance=GUIDANCE, solving=solving_defaults(model, SAMPLER, STEPS))
    return {"decay": decay, "sigma_rel": sigma_rel} | measures.scores(workspace, images)


def table(rows: Rows) -> str:
    return tables.by_arm(rows, measures.SCORES)


def lowest(rows: Rows, decay: str) -> str:
    """The arm of a schedule with the lowest mean FD among the reconstructed averages."""
    arms = {row["arm"] for row in rows.values() if row["decay"] == decay and row["sigma_rel"] is not None}
    return min(sorted(arms), key=lambda arm: tables.mean(rows, arm, measures.fd))


def answer(rows: Rows) -> str:
    """The best average of each schedule, its FD and that of the EMA."""
    parts = []
    for decay in DECAYS:
        best = lowest(rows, decay)
        fds = [tables.mean(rows, arm, measures.fd) for arm in (best, arm_name(decay, None))]
        length = next(row["sigma_rel"] for row in rows.values() if row["arm"] == best)
        parts.append(f"with a {decay} learning rate sigma_rel {length:g} (FD {fds[0]:.1f}; EMA {fds[1]:.1f})")
    return f"The best averages: {' and '.join(parts)}."


def plot(rows: Rows) -> Figure:
    """FD and recall by the length of the average, the EMA as a dashed line; below, samples of the best ones."""
    shown = [arm for decay in DECAYS for arm in (arm_name(decay, None), lowest(rows, decay))]
    grid = [{"": next(row["images"] for row in rows.values() if row["arm"] == arm)} for arm in shown]
    height = strips.grid_height(grid, 10)
    figure = plt.figure(figsize=(10, 3.6 + height), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.6, height])
    for axis, name in zip(above.subplots(1, 2), ("FD-VGG16", "recall")):
        score = measures.SCORES[name][0]
        for color, decay in zip(("C0", "C1"), DECAYS):
            of_decay = [row for row in rows.values() if row["decay"] == decay and row["sigma_rel"] is not None]
            lengths = sorted({row["sigma_rel"] for row in of_decay})
            means = [np.mean([score(row) for row in of_decay if row["sigma_rel"] == length]) for length in lengths]
            axis.plot(lengths, means, color=color, label=f"{decay} learning rate")
            axis.plot([row["sigma_rel"] for row in of_decay], list(map(score, of_decay)), ".", color=color)
            axis.axhline(tables.mean(rows, arm_name(decay, None), score), color=color, ls="--")
        axis.set(xlabel="sigma_rel (dashed: EMA of the config)", ylabel=f"{name} (dots: seeds)")
        scales.set_log_scale(axis, "x")
        axis.grid(alpha=0.3, which="both")
    axis.legend()
    strips.plot_in(below, grid, shown)
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent, "Which average of the parameters gives the best samples?",
    plan, measure, table, answer, plot, first, budgets=("smoke", "cpu", "gpu"),
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
