"""Which training objective gives the best samples: eps, z0, v or the velocity of a rectified flow?

    python experiments/objectives/run.py [--budget=smoke|minutes|cpu|gpu]

Each prediction target with the noise schedule that it is used with in the literature, and the loss weights or the
distribution of timesteps that were proposed for it: min-SNR (Hang 2023), logit-normal (Esser 2024). Unlike
prediction_target, which isolates the target, all arms are sampled by UniPC in 12 steps with classifier-free guidance.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

from matplotlib.figure import Figure

from experiments import bars, budgets, measures, runner, tables
from experiments.recipes import make_guidance
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.pipeline.load import load
from ldm_jax.sampling.recipe import solving_defaults

SCHEDULES = {"eps": "scaled_linear", "z0": "cosine", "v": "cosine", "flow": "rectified_flow"}
UNIFORM = {"diffusion.weighting": "uniform", "diffusion.timestep_sampling": "uniform"}
VARIANTS = {
    "uniform": UNIFORM,
    "min-SNR": UNIFORM | {"diffusion.weighting": "min_snr", "diffusion.snr_gamma": 5.0},
    "logit-normal": UNIFORM | {"diffusion.timestep_sampling": "logit_normal"},
}
SMOKE_ARMS = ("v, min-SNR", "flow, logit-normal")
ARMS = {
    f"{target}, {variant}": {"diffusion.prediction": target, "diffusion.schedule": schedule} | VARIANTS[variant]
    for target, schedule in SCHEDULES.items()
    for variant in ("uniform", "logit-normal" if target == "flow" else "min-SNR")
}
BUDGETS = {  # seeds, training steps, images
    "smoke": ((0,), 2, 10),
    "minutes": ((0,), 1_000, 250),
    "cpu": ((0, 1, 2), 2_900, 5_000),
    "gpu": ((0, 1, 2), 8_000, 5_000),
}
SAMPLER, CALLS, GUIDANCE = "unipc", 12, make_guidance(1.75, (0.1, 0.9))


def plan(budget: str) -> list[tuple[str, int]]:
    arms = SMOKE_ARMS if budget == "smoke" else ARMS
    return [(arm, seed) for seed in BUDGETS[budget][0] for arm in arms]


def run_folder(workspace: Workspace, arm: str, seed: int) -> Path:
    """The trained run of an arm."""
    changes = ARMS[arm] | {"diffusion.steps": BUDGETS[workspace.budget][1], "seed": seed}
    return workspace.on_shared_latents(f"objectives/{arm} {seed}", changes)


def first(workspace: Workspace) -> None:
    workspace.shared_autoencoder()
    measures.classifier_params(workspace)


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    num = BUDGETS[workspace.budget][2]
    model, params = load(run_folder(workspace, arm, seed))
    sample = measures.make_sample(workspace, model, params, num)
    images = sample(seed=seed, guidance=GUIDANCE, solving=solving_defaults(model, SAMPLER, CALLS))
    return measures.scores(workspace, images)


def table(rows: Rows) -> str:
    return tables.by_arm(rows, measures.SCORES)


def answer(rows: Rows) -> str:
    """The lowest FD of flow and of the others, and whether the seeds tell them apart."""
    means = {arm: tables.mean(rows, arm, measures.fd) for arm in tables.arms(rows)}
    flow, classic = (
        min((arm for arm in means if arm.startswith("flow") == is_flow), key=means.get) for is_flow in (True, False)
    )
    seeds = [tables.values(rows, arm, measures.fd) for arm in (flow, classic)]
    text = (
        f"Lowest FD of the flows: {flow} ({means[flow]:.1f}); of the other targets: {classic} ({means[classic]:.1f})."
    )
    if min(map(len, seeds)) == 1:
        return f"{text} One seed each: a small difference means nothing."
    apart = max(seeds[0]) < min(seeds[1]) or max(seeds[1]) < min(seeds[0])
    return f"{text} The ranges of the seeds {'do not overlap' if apart else 'overlap'}."


def plot(rows: Rows) -> Figure:
    return bars.plot_arms(rows, lambda arm: arm.startswith("flow"))


EXPERIMENT = Experiment(
    Path(__file__).parent, "Which training objective gives the best samples?",
    plan, measure, table, answer, plot, first, budgets=budgets.BUDGETS,
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
