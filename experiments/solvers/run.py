"""Which solver has the lowest FD for a number of network calls, and how long does it take?

    python experiments/solvers/run.py [--budget=smoke|minutes|cpu|gpu]

Every solver on one trained model (cosine schedule, v-prediction), with the main job's guidance. The solvers that
extrapolate eps also with leading spacing, which omits the last timesteps. For data with a known denoiser: analytic.py.
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import budgets, measures, runner, scales, tables
from experiments.recipes import make_guidance
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.sampling.recipe import solving_defaults

PLAIN = ("ddpm", "ddim", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc")
WITH_EPS = ("plms", "heun", "edm")
ARMS = {name: (name, {"eta": 0.0, "churn": 10.0 if name == "edm" else 0.0}) for name in (*PLAIN, *WITH_EPS)}
ARMS |= {f"{name}, leading": (name, ARMS[name][1] | {"spacing": "leading"}) for name in WITH_EPS}
STEPS = {  # solver -> steps for a number of network calls, where a step is not one call
    "plms": lambda calls: calls - 1,
    "heun": lambda calls: (calls + 1) // 2,
    "edm": lambda calls: (calls + 1) // 2,
}
BUDGETS = {  # network calls, images
    "smoke": ((5, 10), 10),
    "minutes": ((5, 10, 20, 50), 250),
    "cpu": ((5, 8, 12, 20), 5_000),
    "gpu": ((5, 10, 20, 50, 250), 5_000),
}
GUIDANCE = {  # the main job's; its scale was 2 when the smaller budgets were measured
    budget: make_guidance(1.75 if budget == "cpu" else 2.0, (0.1, 0.9)) for budget in BUDGETS
}


def plan(budget: str) -> list[tuple[str, int]]:
    return [(arm, 0) for arm in (("ddpm", "edm, leading") if budget == "smoke" else ARMS)]


@functools.cache
def shared_sample(workspace: Workspace) -> tuple[LatentDiffusion, Callable[..., np.ndarray]]:
    """The shared model, and its compiled `sample` (`measures.make_sample`)."""
    model, params = load(workspace.shared_model())
    sample = measures.make_sample(workspace, model, params, BUDGETS[workspace.budget][1])
    sample(solving=solving_defaults(model, "ddim", 1))
    return model, sample


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    (model, sample), (all_calls, num), (sampler, options) = (
        shared_sample(workspace),
        BUDGETS[workspace.budget],
        ARMS[arm],
    )
    by_calls = {}
    for calls in all_calls:
        steps = STEPS.get(sampler, lambda calls: calls)(calls)
        solving = solving_defaults(model, sampler, steps)._replace(**options)
        start = time.monotonic()
        images = sample(seed=seed, guidance=GUIDANCE[workspace.budget], solving=solving)
        seconds = (time.monotonic() - start) / num
        by_calls[str(calls)] = {
            "steps": steps,
            "seconds_per_image": seconds,
            "cards": measures.cards(workspace, images),
        }
    return {"by_calls": by_calls}


def fd(calls: str):
    return lambda row: row["by_calls"][calls]["cards"]["FD-VGG16"]["value"]


def calls_of(rows: Rows) -> list[str]:
    return list(next(iter(rows.values()))["by_calls"])


def table(rows: Rows) -> str:
    most = calls_of(rows)[-1]
    columns = {f"FD-VGG16, {calls} calls": (fd(calls), 1) for calls in calls_of(rows)}
    time_of_one = {f"seconds per image, {most} calls": (lambda row: row["by_calls"][most]["seconds_per_image"], 3)}
    return tables.by_arm(rows, columns | time_of_one)


def answer(rows: Rows) -> str:
    def lowest(calls: str) -> str:
        best = min(tables.arms(rows), key=lambda arm: tables.mean(rows, arm, fd(calls)))
        return f"{best} in {calls} calls ({tables.mean(rows, best, fd(calls)):.1f})"

    calls = calls_of(rows)
    ancestral = ", ".join(f"{tables.mean(rows, 'ddpm', fd(n)):.1f} in {n}" for n in calls)
    return f"Lowest FD: {', '.join(lowest(n) for n in calls)}. Ancestral sampling (ddpm) has FD {ancestral}."


def plot(rows: Rows) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for number, arm in enumerate(tables.arms(rows)):
        by_calls = next(row for row in rows.values() if row["arm"] == arm)["by_calls"]
        style = {"marker": "o", "ms": 3, "color": f"C{number % 10}", "ls": "-" if number < 10 else "--"}
        fds = [result["cards"]["FD-VGG16"]["value"] for result in by_calls.values()]
        axes[0].plot([int(calls) for calls in by_calls], fds, label=arm, **style)
        axes[1].plot([result["seconds_per_image"] for result in by_calls.values()], fds, **style)
    axes[0].set(xlabel="network calls", ylabel="FD-VGG16")
    axes[1].set(xlabel="seconds per image")
    for axis in axes:
        scales.set_log_scale(axis)
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.tight_layout(rect=(0, 0, 0.86, 1))
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent, "Which solver has the lowest FD for a number of network calls?",
    plan, measure, table, answer, plot, exclusive=True, budgets=budgets.BUDGETS,
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
