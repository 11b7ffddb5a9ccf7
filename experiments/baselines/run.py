"""Does diffusion beat GANs in variety and stability, and autoregressive models in speed?

    python experiments/baselines/run.py [--budget=smoke|cpu|gpu]

Latent diffusion, a GAN, a gated PixelCNN, a flow and a VAE, all told of classes, of about as many parameters, trained
for equal times (the autoencoder's included) by the main job's loop, and scored alike.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import frame, measures, strips, tables
from experiments.baselines import flow, gan, pixelcnn, vae
from experiments.baselines.stage import Stage, make_stage
from experiments.frame import Experiment, Lab, Row, Rows
from ldm_jax import trained
from ldm_jax.data.datasets import load_dataset
from ldm_jax.data.feeds import DeviceFeed
from ldm_jax.run_folder import Log
from ldm_jax.training.checkpoint import Checkpoints
from ldm_jax.training.interrupt import InterruptWatch
from ldm_jax.training.loop import train
from ldm_jax.training.state import make_optimizer

SHAPE, CLASSES = (28, 28, 1), 10
DIFFUSION = "latent diffusion"
AUTOENCODER_SHARE = 0.4  # of the time, of latent diffusion
BUDGETS = {  # seeds, seconds of training, pictures, test images for the bits per dim
    "smoke": ((0,), 0.2, 10, 20),
    "cpu": ((0, 1, 2, 3, 4), 60, 250, 500),
    "gpu": ((0, 1, 2, 3, 4), 600, 10_000, 10_000),
}
RATE_STEPS = {"smoke": 4, "cpu": 40, "gpu": 400}  # of the run that finds out how many steps fit into a second
COVERED = 0.1  # of a class's pictures, read as it, from which on the class counts as covered
ALIKE = 2.0  # times as long, up to which models count as about as fast: the clock of one seed may differ that much
COLLAPSED = 0.25  # of the variance that real pictures of a class have, below which a model counts as collapsed


class Model(NamedTuple):
    """A baseline: its stage for so many steps, drawing, and the bits per dim where there are such."""

    stage: Callable[[int], Stage]
    part: str  # of the averaged parameters, what draws: "" = all
    draw: Callable[..., jax.Array]  # (params, labels, keys) -> images
    bits: Callable[..., jax.Array] | None  # (params, images, labels, keys) -> [B]


def of_likelihood(model: Any, example: jax.Array, loss: Callable, rate: float) -> Callable[[int], Stage]:
    """The stage of a model that is trained by its bits per dim."""

    def init_params(rng: jax.Array) -> Any:
        return model.init(rng, example, jnp.zeros((1,), jnp.int32))["params"]

    def stage(steps: int) -> Stage:
        optimizer = make_optimizer(
            steps=steps, learning_rate=rate, warmup_steps=min(100, steps // 4), decay="cosine", adam_b2=0.99,
            weight_decay=0.0, clip_norm=1.0,
        )  # fmt: skip
        return make_stage(init_params=init_params, loss=loss, optimizer=optimizer, ema_decay=0.99)

    return stage


class Sizes(NamedTuple):
    """Channels and depths of the baselines; those here make all of about as many parameters as latent diffusion has."""

    pixelcnn: tuple[int, int] = (76, 12)  # features, layers
    flow: tuple[int, int] = (208, 8)  # features, steps of each level
    gan: int = 64
    vae: int = 52


SMALL = Sizes((16, 2), (16, 1), 16, 16)  # to show that it works


def models(sizes: Sizes) -> dict[str, Model]:
    """Name -> baseline."""
    picture = jnp.zeros((1, *SHAPE))
    auto = pixelcnn.PixelCNN(CLASSES, *sizes.pixelcnn)

    def bits(params: Any, images: jax.Array, label: jax.Array, keys: jax.Array) -> jax.Array:
        return pixelcnn.bits_per_dim(auto, params, images, label)  # exact: it needs no keys

    flowing = flow.Flow(CLASSES, *sizes.flow)
    flow_bits = partial(flow.bits_per_dim, flowing)
    vector = vae.VAE(CLASSES, SHAPE, features=sizes.vae)
    vae_bits = partial(vae.bits_per_dim, vector)
    maker = gan.Generator(CLASSES, SHAPE, features=sizes.gan)
    judge = gan.Discriminator(CLASSES, features=sizes.gan)

    def gan_stage(steps: int) -> Stage:
        return gan.make_gan_stage(
            generator=maker, discriminator=judge, loss="non_saturating", r1=1.0, ema_decay=0.99,
            generator_optimizer=optax.adam(1e-3, b1=0.0, b2=0.99),
            discriminator_optimizer=optax.adam(1e-3, b1=0.0, b2=0.99),
        )  # fmt: skip

    return {
        "GAN": Model(gan_stage, "generator", partial(gan.draw, maker), None),
        "PixelCNN": Model(
            of_likelihood(auto, picture, bits, 2e-3), "", partial(pixelcnn.draw, auto, shape=SHAPE[:2]), bits
        ),
        "flow": Model(
            of_likelihood(flowing, picture, flow_bits, 1e-3), "", partial(flow.draw, flowing, shape=SHAPE), flow_bits
        ),
        "VAE": Model(of_likelihood(vector, picture, vae_bits, 1e-3), "", partial(vae.draw, vector), vae_bits),
    }


def plan(budget: str) -> list[tuple[str, int]]:
    return [(arm, seed) for seed in BUDGETS[budget][0] for arm in (DIFFUSION, *models(SMALL))]


def measure(lab: Lab, arm: str, seed: int) -> Row:
    _, seconds, num, tested = BUDGETS[lab.budget]
    labels = np.arange(num, dtype=np.int32) % CLASSES
    if arm == DIFFUSION:
        model, steps = latent_diffusion(lab, seconds, seed)
        parameters = sum(leaf.size for name in ("unet", "conditioner", "autoencoder") for leaf in leaves(model, name))
        drawing = partial(measures.drawing(model, num), seed=seed, guidance=1.5)
        bits = None
    else:
        model = models(SMALL if lab.budget == "smoke" else Sizes())[arm]
        params, steps, parameters = baseline(lab, arm, model, seconds, seed)
        keys = jax.random.split(jax.random.key(seed), num)
        drawn = jax.jit(lambda params, label, keys: model.draw(params, label, keys))
        drawing = lambda: np.asarray(drawn(params, labels, keys))  # noqa: E731
        bits = held_out_bits(lab, model, params, tested) if model.bits else None
    drawing()  # compiles
    start = time.monotonic()
    images = drawing()
    row = {"steps": steps, "parameters": int(parameters), "seconds_per_image": (time.monotonic() - start) / num}
    found = measures.cards(lab, images)
    covered = measures.share_read_as(lab, images, labels)
    variety = measures.variety(lab, images, labels)
    return row | {
        "pictures_seen": sum(steps.values()) * lab.batch_size,
        "training_seconds": seconds,
        "bits_per_dim": bits,
        "cards": found,
        "share_read_as_its_class": covered,
        "classes_covered": sum(share >= COVERED for share in covered),
        "pictures": strips.packed(images[: 2 * CLASSES]),
        "variety": variety,
        "collapsed": variety < COLLAPSED,
    }


def leaves(model: trained.Trained, name: str) -> list[np.ndarray]:
    return jax.tree.leaves(model.params[name])


def latent_diffusion(lab: Lab, seconds: float, seed: int) -> tuple[trained.Trained, dict[str, int]]:
    """The main job with a smaller UNet, both stages in the time."""
    config = {} if lab.budget == "smoke" else frame.SMALLER_UNET  # with the autoencoder 1.7 million parameters
    config = config | {"autoencoder.loss.adversarial": 0.0}  # the discriminator takes half of the time
    steps, sizes = RATE_STEPS[lab.budget], {"autoencoder": 16, "diffusion": lab.batch_size}
    short = {"autoencoder.steps": steps, "diffusion.steps": steps, "log_every": steps // 4}
    rates = {
        stage: lab.once(
            f"baselines/{stage}",
            lambda stage=stage, size=size: frame.images_per_second(
                lab.train("baselines/rate", config | short), stage, size
            ),
        )
        for stage, size in sizes.items()
    }
    times = {"autoencoder": AUTOENCODER_SHARE * seconds, "diffusion": (1 - AUTOENCODER_SHARE) * seconds}
    steps = {stage: lab.steps_in(times[stage], rates[stage], size) for stage, size in sizes.items()}
    changes = {f"{stage}.steps": number for stage, number in steps.items()} | {"seed": seed}
    return trained.load(lab.train(f"baselines/{DIFFUSION} {seed}", config | changes)), steps


def baseline(
    lab: Lab, arm: str, model: Model, seconds: float, seed: int, *, under: str = "baselines"
) -> tuple[Any, dict[str, int], int]:
    """Trained in a folder `under` this name: (averaged parameters that draw, {"baseline": steps}, number of all)."""
    short = RATE_STEPS[lab.budget]

    def rate() -> float:
        folder = lab.runs / f"{under}_rate_{arm}"
        train_baseline(lab, folder, model.stage(short), short, 0, log_every=short // 4)
        return frame.images_per_second(folder, "baseline", lab.batch_size)

    steps = lab.steps_in(seconds, lab.once(f"{under}/{arm}", rate), lab.batch_size)
    state = train_baseline(lab, lab.runs / f"{under}_{arm}_{seed}", model.stage(steps), steps, seed)
    averaged, number = jax.device_get(state.ema_params), sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return averaged[model.part] if model.part else averaged, {"baseline": steps}, number


def train_baseline(lab: Lab, folder: Path, stage: Stage, steps: int, seed: int, log_every: int = 50) -> Any:
    """The state after so many steps on the training images; goes on from the newest checkpoint in `folder`."""
    split = "train[:512]" if lab.budget == "smoke" else "train"
    images = load_dataset("fashion_mnist", split, data_dir=lab.data_dir).arrays
    folder.mkdir(parents=True, exist_ok=True)
    log, identity = Log(folder, write=True), {"steps": str(steps), "seed": str(seed)}
    with InterruptWatch() as watch, Checkpoints(folder / "baseline", keep=1, identity=identity) as checkpoints:
        try:
            return train(
                "baseline", stage, steps=steps, seed=seed, feed=DeviceFeed(images, lab.batch_size, seed), frozen={},
                checkpoints=checkpoints, log=log, watch=watch, log_every=log_every, checkpoint_every=1_000,
            )  # fmt: skip
        finally:
            log.close()


def held_out_bits(lab: Lab, model: Model, params: Any, tested: int) -> float:
    """The mean bits per dim of the first test images."""
    images = load_dataset("fashion_mnist", f"test[:{tested}]", data_dir=lab.data_dir).arrays
    keys, batch = jax.random.split(jax.random.key(0), tested), min(100, tested)
    bits = jax.jit(lambda params, x, label, keys: model.bits(params, x, label, keys))
    parts = [slice(start, start + batch) for start in range(0, tested, batch)]
    return float(np.mean([bits(params, images["x"][p], images["label"][p], keys[p]).mean() for p in parts]))


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
    varied = {arm: tables.mean(rows, arm, lambda row: row["variety"]) for arm in ("GAN", DIFFUSION)}
    slow = {arm: tables.mean(rows, arm, lambda row: row["seconds_per_image"]) for arm in ("PixelCNN", DIFFUSION)}
    ranked = sorted(fds, key=fds.get)
    listed = ", ".join(f"{arm} {fds[arm]:.1f}" for arm in ranked)
    wider = "more" if varied[DIFFUSION] > varied["GAN"] else "no more"
    collapsed = {arm: sum(row["collapsed"] for row in rows.values() if row["arm"] == arm) for arm in varied}
    ratio = slow["PixelCNN"] / slow[DIFFUSION]
    faster = "faster than" if ratio > ALIKE else "slower than" if ratio < 1 / ALIKE else "about as fast as"
    return (
        f"In equal time the FD is: {listed}. Diffusion has {wider} variety than the GAN (within the classes "
        f"{varied[DIFFUSION]:.2f} against {varied['GAN']:.2f} of the variance of real pictures; collapsed: "
        f"{collapsed[DIFFUSION]} and {collapsed['GAN']}) and is {faster} PixelCNN ({slow[DIFFUSION]:.4f} against "
        f"{slow['PixelCNN']:.4f} seconds an image)."
    )


def draw(rows: Rows) -> Figure:
    """Scores above; below two pictures of each class by each model, of its first seed."""
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
    axes[1].set(xlabel="seconds an image", ylabel="FD-VGG16", xscale="log", yscale="log", title="quality and speed")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    strips.draw_in(below, shown, arms)
    return figure


EXPERIMENT = Experiment(
    Path(__file__).parent,
    "Does diffusion beat GANs in variety and stability, and autoregressive models in speed?",
    plan, measure, table, answer, draw,
)  # fmt: skip

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
