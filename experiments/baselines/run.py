"""Does diffusion beat GANs in variety and stability, and autoregressive models in speed?

    python experiments/baselines/run.py [--budget=smoke|cpu|gpu]

Latent diffusion, a GAN, a gated PixelCNN, a flow and a VAE, all class-conditional, of about as many parameters, trained
for equal times (the autoencoder's included) by the main job's loop, and scored alike.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import frame, measures, scales, speed, strips, tables
from experiments.baselines.models import CLASSES, GAN, HALF_A_MILLION, SMALL, Model, Sizes, models
from experiments.baselines.training import course, held_out_bits, sampling_params, size, trained_for
from experiments.frame import Experiment, Lab, Row, Rows
from experiments.recipes import guided
from experiments.untrained import untrained
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.training.from_config import make_autoencoder_stage

DIFFUSION, PIXELCNN = "latent diffusion", "PixelCNN"
ARMS = (DIFFUSION, *models(SMALL))
STAGES, PARTS = ("autoencoder", "diffusion"), ("denoiser", "conditioning", "first_stage")
AUTOENCODER_SHARE = 0.4  # of the time, of latent diffusion
BUDGETS = {  # seeds, seconds of training, samples, test images for the bits per dim
    "smoke": ((0,), 0.2, 10, 20),
    "cpu": ((0, 1, 2, 3, 4), 25, 250, 500),
    "gpu": ((0, 1, 2, 3, 4), 20, 5_000, 10_000),
}
SIZES = {"smoke": SMALL, "cpu": HALF_A_MILLION, "gpu": Sizes()}
DIFFUSION_SIZES = {  # as many parameters, with the autoencoder's
    "smoke": {},
    "cpu": {"unet.block_out_channels": (16, 32), "autoencoder.block_out_channels": (16, 32, 32)},
    "gpu": frame.SMALLER_UNET,
}
COVERED = 0.1  # of a class's samples, read as it, from which on the class counts as covered
ALIKE = 1.2  # times as long, up to which models count as about as fast
COLLAPSED = 0.25  # of the variance that real images of a class have, below which a model counts as collapsed

Sample = Callable[[int], np.ndarray]  # seed -> images, the same number of each class


def plan(budget: str) -> list[tuple[str, int]]:
    few = (DIFFUSION, GAN, PIXELCNN) if budget == "smoke" else ARMS
    return [(arm, seed) for seed in BUDGETS[budget][0] for arm in few]


def first(lab: Lab) -> None:
    speed.measured(lab, training_tasks(lab) | sampling_tasks(lab))
    measures.judge_of(lab)


def measure(lab: Lab, arm: str, seed: int) -> Row:
    _, seconds, num, tested = BUDGETS[lab.budget]
    labels = np.arange(num, dtype=np.int32) % CLASSES
    if arm == DIFFUSION:
        (model, params), steps = latent_diffusion(lab, seconds, seed)
        parameters = sum(leaf.size for name in PARTS for leaf in jax.tree.leaves(params[name]))
        images, bits = diffusion_sample(lab, model, params, num)(seed), None
    else:
        model = baseline_of(lab, arm)
        rate = speed.measured(lab, training_tasks(lab))[rate_of(arm)]
        state, number = trained_for(lab, named(arm), model, seconds, rate, seed)
        params, steps, parameters = sampling_params(model, state), {"baseline": number}, size(state)
        images = baseline_sample(model, params, labels)(seed)
        bits = held_out_bits(lab, model, params, tested) if model.bits else None
    covered = measures.share_read_as(lab, images, labels)
    variety = measures.variety(lab, images, labels)
    return {
        "steps": steps,
        "parameters": int(parameters),
        "seconds_per_image": speed.measured(lab, sampling_tasks(lab))[sampling_of(arm)],
        "pictures_seen": seen(lab, steps),
        "training_seconds": seconds,
        "bits_per_dim": bits,
        "cards": measures.cards(lab, images),
        "share_read_as_its_class": covered,
        "classes_covered": sum(share >= COVERED for share in covered),
        "pictures": strips.packed(images[: 2 * CLASSES]),
        "variety": variety,
        "collapsed": variety < COLLAPSED,
    }


def training_tasks(lab: Lab) -> dict[str, speed.Task]:
    """Images a second in training, of each stage of latent diffusion and of each baseline."""
    config = lab.config(diffusion_config(lab))
    courses = {"autoencoder": partial(speed.of_autoencoder, config), "diffusion": partial(speed.of_diffusion, config)}
    courses |= {arm: partial(course, lab, baseline_of(lab, arm)) for arm in arms(lab) if arm != DIFFUSION}
    return {rate_of(name): speed.images_per_second(lab, make) for name, make in courses.items()}


def rate_of(name: str) -> str:
    return f"{named(name)}, images a second"


def sampling_tasks(lab: Lab) -> dict[str, speed.Task]:
    """Seconds an image, which a model takes before it is trained as after."""

    def untrained_sample(arm: str) -> Sample:
        num = BUDGETS[lab.budget][2]
        if arm == DIFFUSION:
            return diffusion_sample(lab, *untrained_diffusion(lab), num)
        model = baseline_of(lab, arm)
        params = sampling_params(model, jax.jit(model.stage(1).init)(jax.random.key(0)))
        return baseline_sample(model, params, np.arange(num, dtype=np.int32) % CLASSES)

    return {sampling_of(arm): speed.seconds_per_image(partial(untrained_sample, arm)) for arm in arms(lab)}


def sampling_of(arm: str) -> str:
    return f"{named(arm)}, seconds an image"


def named(arm: str) -> str:
    return f"baselines {arm}"


def arms(lab: Lab) -> list[str]:
    """Those of the budget."""
    return list(dict.fromkeys(arm for arm, _ in plan(lab.budget)))


def baseline_of(lab: Lab, arm: str) -> Model:
    return models(SIZES[lab.budget])[arm]


def baseline_sample(model: Model, params: dict, labels: np.ndarray) -> Sample:
    sample = jax.jit(lambda params, label, keys: model.sample(params, label, keys))
    return lambda seed: np.asarray(sample(params, labels, jax.random.split(jax.random.key(seed), len(labels))))


def diffusion_sample(lab: Lab, model: LatentDiffusion, params: Params, num: int) -> Sample:
    sample = measures.sampling(lab, model, params, num)
    return lambda seed: sample(seed=seed, guidance=guided(1.5))


def latent_diffusion(lab: Lab, seconds: float, seed: int) -> tuple[tuple[LatentDiffusion, Params], dict[str, int]]:
    """The main job with a smaller UNet, both stages in the time."""
    shares = {"autoencoder": AUTOENCODER_SHARE, "diffusion": 1 - AUTOENCODER_SHARE}
    rates = speed.measured(lab, training_tasks(lab))
    steps = {
        stage: lab.steps_in(shares[stage] * seconds, rates[rate_of(stage)], size)
        for stage, size in batch_sizes(lab).items()
    }
    changes = diffusion_config(lab) | {f"{stage}.steps": number for stage, number in steps.items()} | {"seed": seed}
    return load(lab.train(f"baselines/{DIFFUSION} {seed}", changes)), steps


def untrained_diffusion(lab: Lab) -> tuple[LatentDiffusion, Params]:
    """Latent diffusion as it begins, for what does not depend on what it has learned."""
    config, key = lab.config(diffusion_config(lab)), jax.random.key(0)
    (model, params), first_stage = untrained(config, key), jax.jit(make_autoencoder_stage(config).init)(key)
    return model, params | {"first_stage": first_stage.ema_params["autoencoder"]}


def diffusion_config(lab: Lab) -> dict:
    large = {"autoencoder.batch_size": lab.batch_size} if lab.budget == "gpu" else {}
    # Without the discriminator, which takes half of the time.
    return DIFFUSION_SIZES[lab.budget] | large | {"autoencoder.loss.adversarial": 0.0}


def batch_sizes(lab: Lab) -> dict[str, int]:
    config = lab.config(diffusion_config(lab))
    return {stage: config[stage].batch_size for stage in STAGES}


def seen(lab: Lab, steps: dict[str, int]) -> int:
    """Training images, each time that they were seen."""
    sizes = batch_sizes(lab)
    return sum(number * sizes.get(stage, lab.batch_size) for stage, number in steps.items())


def score(name: str):
    return lambda row: row["cards"][name]["value"]


def table(rows: Rows) -> str:
    head = ["model", "million parameters", "thousand pictures seen", "FD-VGG16", "KID-VGG16", "precision", "recall"]
    head += ["variety", "classes covered", "bits/dim", "seconds an image", "collapsed"]
    columns = [
        (score("FD-VGG16"), 1), (score("KID-VGG16"), 3), (score("precision-VGG16"), 2), (score("recall-VGG16"), 2),
        (lambda row: row["variety"], 2), (lambda row: row["classes_covered"], 1),
    ]  # fmt: skip
    body = []
    for arm in tables.arms(rows):
        some = [row for row in rows.values() if row["arm"] == arm]
        bits = [row["bits_per_dim"] for row in some if row["bits_per_dim"] is not None]
        body.append([
            arm,
            f"{some[0]['parameters'] / 1e6:.2f}",
            f"{some[0]['pictures_seen'] / 1e3:.1f}",
            *(tables.spread([of(row) for row in some], digits) for of, digits in columns),
            tables.spread(bits, 2) if bits else "-",
            f"{np.mean([row['seconds_per_image'] for row in some]):.4f}",
            f"{sum(row['collapsed'] for row in some)} of {len(some)}",
        ])  # fmt: skip
    return tables.table(head, body)


def answer(rows: Rows) -> str:
    fds = {arm: tables.mean(rows, arm, score("FD-VGG16")) for arm in tables.arms(rows)}
    varied = {arm: tables.mean(rows, arm, lambda row: row["variety"]) for arm in (GAN, DIFFUSION)}
    slow = {arm: tables.mean(rows, arm, lambda row: row["seconds_per_image"]) for arm in (PIXELCNN, DIFFUSION)}
    ranked = sorted(fds, key=fds.get)
    listed = ", ".join(f"{arm} {fds[arm]:.1f}" for arm in ranked)
    gan, diffusion = (tables.values(rows, arm, lambda row: row["variety"]) for arm in (GAN, DIFFUSION))
    # Seeds that overlap tell of no difference.
    compared = "more" if min(diffusion) > max(gan) else "less" if max(diffusion) < min(gan) else "neither more nor less"
    collapsed = {arm: sum(row["collapsed"] for row in rows.values() if row["arm"] == arm) for arm in varied}
    ratio = slow[PIXELCNN] / slow[DIFFUSION]
    faster = "faster than" if ratio > ALIKE else "slower than" if ratio < 1 / ALIKE else "about as fast as"
    return (
        f"In equal time the FD is: {listed}. Diffusion has {compared} variety than the GAN (within the classes "
        f"{varied[DIFFUSION]:.2f} against {varied[GAN]:.2f} of the variance of real pictures; collapsed: "
        f"{collapsed[DIFFUSION]} and {collapsed[GAN]}), and it is {faster} PixelCNN ({slow[DIFFUSION]:.4f} against "
        f"{slow[PIXELCNN]:.4f} seconds an image)."
    )


def draw(rows: Rows) -> Figure:
    """Scores above; below two samples of each class by each model, of its first seed."""
    arms = tables.arms(rows)
    shown = [{"": next(row["pictures"] for row in rows.values() if row["arm"] == arm)} for arm in arms]
    figure = plt.figure(figsize=(10, 3.8 + strips.height_of(shown, 10)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.8, strips.height_of(shown, 10)])
    axes = above.subplots(1, 2)
    for arm in arms:
        some = [row for row in rows.values() if row["arm"] == arm]
        recall, precision, fd = (
            [score(f"{name}-VGG16")(row) for row in some] for name in ("recall", "precision", "FD")
        )
        axes[0].plot(recall, precision, "o", label=arm)
        axes[1].plot([row["seconds_per_image"] for row in some], fd, "o", label=arm)
    axes[0].set(xlabel="recall", ylabel="precision", title="variety and likeness (dots: seeds)")
    axes[1].set(xlabel="seconds an image", ylabel="FD-VGG16", title="quality and speed")
    scales.logarithmic(axes[1])
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    strips.draw_in(below, shown, arms)
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent,
    "Does diffusion beat GANs in variety and stability, and autoregressive models in speed?",
    plan, measure, table, answer, draw, first,
)  # fmt: skip

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
