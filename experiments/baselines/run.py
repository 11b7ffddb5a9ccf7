"""Does diffusion beat GANs in diversity and stability, and autoregressive models in speed?

    python experiments/baselines/run.py [--budget=smoke|minutes|gpu]

Latent diffusion, a GAN, a gated PixelCNN, a flow and a VAE, all class-conditional, with about equal numbers of
parameters, trained for equal times (the autoencoder's included) by the main job's loop, with the same metrics.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import budgets, measures, runner, scales, speed, strips, tables
from experiments.baselines.models import CLASSES, GAN, HALF_A_MILLION, SMALL, Model, Sizes, models
from experiments.baselines.training import num_params, sampling_params, test_bits, trained_for, training_setup
from experiments.recipes import make_guidance
from experiments.runner import Experiment, Row, Rows, Workspace
from experiments.untrained import untrained_model
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.training.from_config import make_autoencoder_stage

DIFFUSION, PIXELCNN = "latent diffusion", "PixelCNN"
ARMS = (DIFFUSION, *models(SMALL))
STAGES, PARTS = ("autoencoder", "diffusion"), ("denoiser", "conditioning", "first_stage")
AUTOENCODER_SHARE = 0.4  # of latent diffusion's training time
BUDGETS = {  # seeds, seconds of training, samples, test images for the bits per dim
    "smoke": ((0,), 0.2, 10, 20),
    "minutes": ((0, 1, 2, 3, 4), 25, 250, 500),
    "gpu": ((0, 1, 2, 3, 4), 20, 5_000, 10_000),
}
SIZES = {"smoke": SMALL, "minutes": HALF_A_MILLION, "gpu": Sizes()}
DIFFUSION_SIZES = {  # about as many parameters, including the autoencoder's
    "smoke": {},
    "minutes": {"unet.block_out_channels": (16, 32), "autoencoder.block_out_channels": (16, 32, 32)},
    "gpu": budgets.SMALLER_UNET,
}
COVERED = 0.1  # least classifier accuracy of a class that counts as covered
EQUALLY_FAST = 1.2  # largest ratio of sampling times that count as about equal
COLLAPSED = 0.25  # diversity below which a model counts as collapsed

Sample = Callable[[int], np.ndarray]  # seed -> images, equal numbers of each class


def plan(budget: str) -> list[tuple[str, int]]:
    arms = (DIFFUSION, GAN, PIXELCNN) if budget == "smoke" else ARMS
    return [(arm, seed) for seed in BUDGETS[budget][0] for arm in arms]


def first(workspace: Workspace) -> None:
    speed.measure_speeds(workspace, training_timings(workspace) | sampling_timings(workspace))
    measures.classifier_params(workspace)


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    _, seconds, num, num_test = BUDGETS[workspace.budget]
    labels = np.arange(num, dtype=np.int32) % CLASSES
    if arm == DIFFUSION:
        (model, params), steps = latent_diffusion(workspace, seconds, seed)
        parameters = sum(leaf.size for name in PARTS for leaf in jax.tree.leaves(params[name]))
        images, bits = diffusion_sample(workspace, model, params, num)(seed), None
    else:
        model = baseline_of(workspace, arm)
        rate = speed.measure_speeds(workspace, training_timings(workspace))[rate_name(arm)]
        state, num_steps = trained_for(workspace, run_name(arm), model, seconds, rate, seed)
        params, steps, parameters = sampling_params(model, state), {"baseline": num_steps}, num_params(state)
        images = baseline_sample(model, params, labels)(seed)
        bits = test_bits(workspace, model, params, num_test) if model.bits else None
    accuracy = measures.class_accuracy(workspace, images, labels)
    diversity = measures.diversity(workspace, images, labels)
    return {
        "steps": steps,
        "parameters": int(parameters),
        "seconds_per_image": speed.measure_speeds(workspace, sampling_timings(workspace))[sampling_name(arm)],
        "images_seen": images_seen(workspace, steps),
        "training_seconds": seconds,
        "bits_per_dim": bits,
        "cards": measures.cards(workspace, images),
        "class_accuracy": accuracy,
        "classes_covered": sum(share >= COVERED for share in accuracy),
        "images": strips.encode(images[: 2 * CLASSES]),
        "diversity": diversity,
        "collapsed": diversity < COLLAPSED,
    }


def training_timings(workspace: Workspace) -> dict[str, speed.Timing]:
    """Timings of training, in images per second: each stage of latent diffusion, each baseline."""
    config = workspace.config(diffusion_config(workspace))
    setups = {
        "autoencoder": partial(speed.autoencoder_setup, config),
        "diffusion": partial(speed.diffusion_setup, config),
    }
    setups |= {
        arm: partial(training_setup, workspace, baseline_of(workspace, arm))
        for arm in arms(workspace)
        if arm != DIFFUSION
    }
    return {rate_name(name): speed.images_per_second(workspace, make) for name, make in setups.items()}


def rate_name(name: str) -> str:
    return f"{run_name(name)}, images a second"


def sampling_timings(workspace: Workspace) -> dict[str, speed.Timing]:
    """Timings of sampling, in seconds per image, by untrained models, which are as fast as trained ones."""

    def untrained_sample(arm: str) -> Sample:
        num = BUDGETS[workspace.budget][2]
        if arm == DIFFUSION:
            return diffusion_sample(workspace, *untrained_diffusion(workspace), num)
        model = baseline_of(workspace, arm)
        params = sampling_params(model, jax.jit(model.stage(1).init)(jax.random.key(0)))
        return baseline_sample(model, params, np.arange(num, dtype=np.int32) % CLASSES)

    return {sampling_name(arm): speed.seconds_per_image(partial(untrained_sample, arm)) for arm in arms(workspace)}


def sampling_name(arm: str) -> str:
    return f"{run_name(arm)}, seconds an image"


def run_name(arm: str) -> str:
    return f"baselines {arm}"


def arms(workspace: Workspace) -> list[str]:
    """The arms of the budget."""
    return list(dict.fromkeys(arm for arm, _ in plan(workspace.budget)))


def baseline_of(workspace: Workspace, arm: str) -> Model:
    return models(SIZES[workspace.budget])[arm]


def baseline_sample(model: Model, params: dict, labels: np.ndarray) -> Sample:
    sample = jax.jit(lambda params, label, keys: model.sample(params, label, keys))
    return lambda seed: np.asarray(sample(params, labels, jax.random.split(jax.random.key(seed), len(labels))))


def diffusion_sample(workspace: Workspace, model: LatentDiffusion, params: Params, num: int) -> Sample:
    sample = measures.make_sample(workspace, model, params, num)
    return lambda seed: sample(seed=seed, guidance=make_guidance(1.5))


def latent_diffusion(
    workspace: Workspace, seconds: float, seed: int
) -> tuple[tuple[LatentDiffusion, Params], dict[str, int]]:
    """Trains the main job with smaller networks, both stages within `seconds`; returns model, params and steps."""
    shares = {"autoencoder": AUTOENCODER_SHARE, "diffusion": 1 - AUTOENCODER_SHARE}
    rates = speed.measure_speeds(workspace, training_timings(workspace))
    steps = {
        stage: workspace.steps_in(shares[stage] * seconds, rates[rate_name(stage)], batch)
        for stage, batch in batch_sizes(workspace).items()
    }
    changes = (
        diffusion_config(workspace) | {f"{stage}.steps": number for stage, number in steps.items()} | {"seed": seed}
    )
    return load(workspace.train(f"baselines/{DIFFUSION} {seed}", changes)), steps


def untrained_diffusion(workspace: Workspace) -> tuple[LatentDiffusion, Params]:
    """Latent diffusion with its initial parameters, to measure the speed of sampling."""
    config, key = workspace.config(diffusion_config(workspace)), jax.random.key(0)
    (model, params), first_stage = untrained_model(config, key), jax.jit(make_autoencoder_stage(config).init)(key)
    return model, params | {"first_stage": first_stage.ema_params["autoencoder"]}


def diffusion_config(workspace: Workspace) -> dict:
    large = {"autoencoder.batch_size": workspace.batch_size} if workspace.budget == "gpu" else {}
    # Without the discriminator, which would take half of the time.
    return DIFFUSION_SIZES[workspace.budget] | large | {"autoencoder.loss.adversarial": 0.0}


def batch_sizes(workspace: Workspace) -> dict[str, int]:
    config = workspace.config(diffusion_config(workspace))
    return {stage: config[stage].batch_size for stage in STAGES}


def images_seen(workspace: Workspace, steps: dict[str, int]) -> int:
    """The number of training images in all steps."""
    sizes = batch_sizes(workspace)
    return sum(number * sizes.get(stage, workspace.batch_size) for stage, number in steps.items())


def score(name: str):
    return lambda row: row["cards"][name]["value"]


def table(rows: Rows) -> str:
    head = ["model", "million parameters", "thousand images seen", "FD-VGG16", "KID-VGG16", "precision", "recall"]
    head += ["diversity", "classes covered", "bits/dim", "seconds per image", "collapsed"]
    columns = [
        (score("FD-VGG16"), 1), (score("KID-VGG16"), 3), (score("precision-VGG16"), 2), (score("recall-VGG16"), 2),
        (lambda row: row["diversity"], 2), (lambda row: row["classes_covered"], 1),
    ]  # fmt: skip
    body = []
    for arm in tables.arms(rows):
        seeds = [row for row in rows.values() if row["arm"] == arm]
        bits = [row["bits_per_dim"] for row in seeds if row["bits_per_dim"] is not None]
        body.append([
            arm,
            f"{seeds[0]['parameters'] / 1e6:.2f}",
            f"{seeds[0]['images_seen'] / 1e3:.1f}",
            *(tables.mean_and_range([score(row) for row in seeds], digits) for score, digits in columns),
            tables.mean_and_range(bits, 2) if bits else "-",
            f"{np.mean([row['seconds_per_image'] for row in seeds]):.4f}",
            f"{sum(row['collapsed'] for row in seeds)} of {len(seeds)}",
        ])  # fmt: skip
    return tables.table(head, body)


def answer(rows: Rows) -> str:
    fds = {arm: tables.mean(rows, arm, score("FD-VGG16")) for arm in tables.arms(rows)}
    diversity = {arm: tables.mean(rows, arm, lambda row: row["diversity"]) for arm in (GAN, DIFFUSION)}
    seconds = {arm: tables.mean(rows, arm, lambda row: row["seconds_per_image"]) for arm in (PIXELCNN, DIFFUSION)}
    ranked = sorted(fds, key=fds.get)
    listed = ", ".join(f"{arm} {fds[arm]:.1f}" for arm in ranked)
    gan, diffusion = (tables.values(rows, arm, lambda row: row["diversity"]) for arm in (GAN, DIFFUSION))
    # Overlapping ranges of seeds count as no difference.
    compared = "more" if min(diffusion) > max(gan) else "less" if max(diffusion) < min(gan) else "neither more nor less"
    collapsed = {arm: sum(row["collapsed"] for row in rows.values() if row["arm"] == arm) for arm in diversity}
    ratio = seconds[PIXELCNN] / seconds[DIFFUSION]
    faster = (
        "faster than" if ratio > EQUALLY_FAST else "slower than" if ratio < 1 / EQUALLY_FAST else "about as fast as"
    )
    return (
        f"FD after equal training times: {listed}. Diffusion has {compared} diversity than the GAN "
        f"({diversity[DIFFUSION]:.2f} and {diversity[GAN]:.2f} of the within-class variance of real images; collapsed "
        f"seeds: {collapsed[DIFFUSION]} and {collapsed[GAN]}), and its sampling is {faster} PixelCNN's "
        f"({seconds[DIFFUSION]:.4f} and {seconds[PIXELCNN]:.4f} seconds per image)."
    )


def plot(rows: Rows) -> Figure:
    """Scores; below, two samples of each class by each model with its first seed."""
    arms = tables.arms(rows)
    shown = [{"": next(row["images"] for row in rows.values() if row["arm"] == arm)} for arm in arms]
    figure = plt.figure(figsize=(10, 3.8 + strips.grid_height(shown, 10)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.8, strips.grid_height(shown, 10)])
    axes = above.subplots(1, 2)
    for arm in arms:
        seeds = [row for row in rows.values() if row["arm"] == arm]
        recall, precision, fd = (
            [score(f"{name}-VGG16")(row) for row in seeds] for name in ("recall", "precision", "FD")
        )
        axes[0].plot(recall, precision, "o", label=arm)
        axes[1].plot([row["seconds_per_image"] for row in seeds], fd, "o", label=arm)
    axes[0].set(xlabel="recall", ylabel="precision", title="precision and recall (dots: seeds)")
    axes[1].set(xlabel="seconds per image", ylabel="FD-VGG16", title="quality and speed")
    scales.set_log_scale(axes[1])
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    strips.plot_in(below, shown, arms)
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent,
    "Does diffusion beat GANs in diversity and stability, and autoregressive models in speed?",
    plan, measure, table, answer, plot, first,
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
