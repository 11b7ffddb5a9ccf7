"""How good are samples of 1, 2, 4, 8 and 16 steps: fast solvers, consistency distillation, MeanFlow?

    python experiments/few_steps/run.py [--budget=smoke|cpu]

The main job by DDIM and UniPC, with classifier-free guidance; that model distilled to a latent consistency model (Luo
2023); and MeanFlow (Geng 2025) trained from nothing on the same latents. A step of the solvers calls the guided
network, with and without condition; one of the others calls a network once, which has learnt the guidance.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from configs import fashion_mnist_meanflow, lcm
from experiments import measures, runner, scales, strips, tables
from experiments.recipes import make_guidance
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.pipeline.load import load
from ldm_jax.run_folder.log import read_metrics
from ldm_jax.sampling.recipe import solving_defaults

MAIN_JOB, DISTILLED, MEAN_FLOW = ("DDIM", "UniPC"), "LCM", "MeanFlow"
SOLVERS = {"DDIM": "ddim", "UniPC": "unipc", DISTILLED: "lcm", MEAN_FLOW: "ddim"}
SCALE = 1.75  # of classifier-free guidance
GUIDED = make_guidance(SCALE, (0.1, 0.9))
BUDGETS = {  # numbers of sampling steps of the main job and of the others; training steps of MeanFlow and LCM; images
    "smoke": ((1, 2), (1, 2), 2, 2, 10),
    "cpu": ((1, 2, 4, 8, 16), (1, 2, 4, 8), 2_000, 1_000, 5_000),
}
MEAN_FLOW_CHANGES = {"diffusion.batch_size": 64, "diffusion.learning_rate": 2e-3, "mean_flow.guidance": SCALE}
LCM_CHANGES = {
    "data.name": "fashion_mnist",
    "data.caption_key": "none",
    "data.image_size": 28,
    "data.channels": 1,
    "data.test_split": "test",
    "diffusion.batch_size": 64,
    "diffusion.learning_rate": 3e-4,
    "consistency.guidance_min": SCALE,
    "consistency.guidance_max": SCALE,
}


def plan(budget: str) -> list[tuple[str, int]]:
    of_main_job, of_others, *_ = BUDGETS[budget]
    numbers = {method: of_main_job if method in MAIN_JOB else of_others for method in SOLVERS}
    return [(f"{method}, {steps}", 0) for method in SOLVERS for steps in numbers[method]]


def run_folder(workspace: Workspace, method: str) -> Path:
    """The trained run of a method."""
    *_, mean_flow_steps, lcm_steps, _ = BUDGETS[workspace.budget]
    if method == DISTILLED:
        changes = LCM_CHANGES | {"init_from": str(workspace.shared_model()), "diffusion.steps": lcm_steps}
        return workspace.train("lcm", changes, lcm)
    if method == MEAN_FLOW:
        changes = MEAN_FLOW_CHANGES | {"autoencoder.checkpoint": str(workspace.shared_autoencoder())}
        return workspace.train("mean_flow", changes | {"diffusion.steps": mean_flow_steps}, fashion_mnist_meanflow)
    return workspace.shared_model()


def first(workspace: Workspace) -> None:
    for method in (DISTILLED, MEAN_FLOW):
        run_folder(workspace, method)
    measures.classifier_params(workspace)


def training_seconds(folder: Path) -> float:
    """The seconds of a run's diffusion stage without compilation."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "diffusion_seconds" in line]
    return sum(line["diffusion_seconds"] - line["diffusion_compile_seconds"] for line in lines)


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    method, steps = arm.split(", ")
    folder, num = run_folder(workspace, method), BUDGETS[workspace.budget][-1]
    model, params = load(folder)
    solving = solving_defaults(model, SOLVERS[method], int(steps))
    guidance = GUIDED if method in MAIN_JOB else make_guidance(1.0)
    images = measures.make_sample(workspace, model, params, num)(seed=seed, solving=solving, guidance=guidance)
    trained = {} if method in MAIN_JOB else {"training_seconds": round(training_seconds(folder), 1)}
    return {"method": method, "steps": int(steps)} | trained | measures.scores(workspace, images)


def table(rows: Rows) -> str:
    return tables.by_arm(rows, measures.SCORES)


def answer(rows: Rows) -> str:
    """FD of each method in few steps and of MeanFlow in one, the lowest of the main job, the seconds of training."""
    best = min((row for row in rows.values() if row["method"] in MAIN_JOB), key=measures.fd)
    few = {method: min(rows_of(rows, method), key=lambda row: abs(row["steps"] - 4)) for method in SOLVERS}
    one = rows_of(rows, MEAN_FLOW)[0]
    in_few = ", ".join(f"{method} {measures.fd(row):.1f}" for method, row in few.items())
    steps = few[DISTILLED]["steps"]
    return (
        f"FD in {steps} steps: {in_few}. MeanFlow in one step has {measures.fd(one):.1f}. The lowest of the main job "
        f"is {measures.fd(best):.1f} ({best['arm']}). The distillation took {few[DISTILLED]['training_seconds']:.0f} "
        f"seconds, MeanFlow's training {one['training_seconds']:.0f}."
    )


def rows_of(rows: Rows, method: str) -> list[Row]:
    """The rows of a method, in the order of steps."""
    return sorted((row for row in rows.values() if row["method"] == method), key=lambda row: row["steps"])


def plot(rows: Rows) -> Figure:
    """The two Fréchet distances by the number of steps; below, the samples of each method."""
    shown = [{"": row["images"]} for method in SOLVERS for row in rows_of(rows, method)]
    names = [row["arm"] for method in SOLVERS for row in rows_of(rows, method)]
    height = strips.grid_height(shown, 11)
    figure = plt.figure(figsize=(11, 3.6 + height), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.6, height])
    for axis, name in zip(above.subplots(1, 2), ("FD-VGG16", "FD in the classifier's features")):
        for method in SOLVERS:
            points = [(row["steps"], measures.SCORES[name][0](row)) for row in rows_of(rows, method)]
            axis.plot(*zip(*points), marker=".", label=method)
        axis.set(xlabel="sampling steps", ylabel=name)
        scales.set_log_scale(axis)
        axis.grid(alpha=0.3, which="both")
    axis.legend()
    strips.plot_in(below, shown, names)
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent, "How good are samples of one to 16 steps?",
    plan, measure, table, answer, plot, first, budgets=("smoke", "cpu"),
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
