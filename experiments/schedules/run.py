"""Does the cosine schedule beat the linear one?

    python experiments/schedules/run.py [--budget=smoke|minutes|gpu]

Linear (Ho 2020), scaled-linear (Rombach 2022), cosine (Nichol & Dhariwal 2021) and linear with zero terminal SNR (Lin
2023), all with v-prediction, sampled by DDIM in 10, 50 and 250 network calls. The figure also has their SNR.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import measures, runner, scales, tables
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.pipeline.load import load
from ldm_jax.sampling.recipe import solving_defaults

ARMS = {
    "linear": {"diffusion.schedule": "linear"},
    "scaled-linear": {"diffusion.schedule": "scaled_linear"},
    "cosine": {"diffusion.schedule": "cosine"},
    "linear, zero SNR": {"diffusion.schedule": "linear", "diffusion.zero_terminal_snr": True},
}
CALLS = (10, 50, 250)
BUDGETS = {  # seeds, training steps, images
    "smoke": ((0,), 2, 10),
    "minutes": ((0, 1, 2), 1_800, 250),
    "gpu": ((0, 1, 2), 2_500, 5_000),
}


def plan(budget: str) -> list[tuple[str, int]]:
    arms = list(ARMS)[:: len(ARMS) - 1] if budget == "smoke" else ARMS
    return [(arm, seed) for seed in BUDGETS[budget][0] for arm in arms]


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    _, steps, num = BUDGETS[workspace.budget]
    # Uniform weights, because min-SNR weights depend on the schedule.
    changes = {"diffusion.prediction": "v", "diffusion.weighting": "uniform", "diffusion.steps": steps, "seed": seed}
    model, params = load(workspace.on_shared_latents(f"schedules/{arm} {seed}", changes | ARMS[arm]))
    sample = measures.make_sample(workspace, model, params, num)
    samples = {calls: sample(seed=seed, solving=solving_defaults(model, "ddim", calls)) for calls in CALLS}
    return {
        "steps": steps,
        "cards_by_calls": {str(calls): measures.cards(workspace, images) for calls, images in samples.items()},
    }


def fd(calls: int):
    return lambda row: row["cards_by_calls"][str(calls)]["FD-VGG16"]["value"]


def table(rows: Rows) -> str:
    return tables.by_arm(rows, {f"FD-VGG16, {calls} calls": (fd(calls), 1) for calls in CALLS})


def answer(rows: Rows) -> str:
    few, many = CALLS[0], CALLS[-1]
    linear, cosine = ({n: tables.mean(rows, arm, fd(n)) for n in (few, many)} for arm in ("linear", "cosine"))
    best = min(tables.arms(rows), key=lambda arm: tables.mean(rows, arm, fd(many)))
    word = "Yes" if cosine[many] < linear[many] else "No"
    return (
        f"{word}, on these latents: FD {cosine[many]:.1f} (linear: {linear[many]:.1f}) in {many} calls, "
        f"{cosine[few]:.1f} ({linear[few]:.1f}) in {few}; lowest: {best} ({tables.mean(rows, best, fd(many)):.1f})."
    )


def plot(rows: Rows) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    for arm, changes in ARMS.items():
        fields = {name.split(".")[1]: value for name, value in changes.items()}
        process = make_process(
            fields["schedule"], 1000, beta_start=1e-4, beta_end=0.02,
            zero_terminal_snr=fields.get("zero_terminal_snr", False),
        )  # fmt: skip
        with np.errstate(divide="ignore"):
            left.plot(2 * np.log10(process.alpha / process.sigma), label=arm)
        means = [tables.mean(rows, arm, fd(calls)) for calls in CALLS]
        (line,) = right.plot(CALLS, means, label=arm)
        for calls in CALLS:
            fds = tables.values(rows, arm, fd(calls))
            right.plot([calls] * len(fds), fds, ".", color=line.get_color())
    left.set(title="signal-to-noise ratio", xlabel="t", ylabel="log10 SNR", ylim=(-6, 4.5))
    right.set(title="FD-VGG16 (dots: seeds)", xlabel="network calls")
    scales.set_log_scale(right, "x")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent, "Does the cosine schedule beat the linear one?",
    plan, measure, table, answer, plot, Workspace.shared_autoencoder,
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
