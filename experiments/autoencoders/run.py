"""Does an autoencoder need a prior for its latent space to be useful? And what do the terms of its loss improve?

    python experiments/autoencoders/run.py [--budget=smoke|minutes|gpu]

A plain autoencoder, VAEs with several KL weights, a VQ-VAE; with LPIPS, the patch discriminator and both. For each: the
reconstructions of test images, images decoded from Gaussian noise, samples of a diffusion model on its latents.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from the repository root

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments import measures, runner, strips, tables
from experiments.recipes import make_guidance
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.evaluation.scoring import reconstruct
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling.sampler import make_sampler

PLAIN = {"autoencoder.loss.perceptual": 0.0, "autoencoder.loss.adversarial": 0.0}
LPIPS = {"autoencoder.loss.perceptual": 0.5, "autoencoder.loss.perceptual_every": 8}
ADVERSARIAL = {"autoencoder.loss.adversarial": 0.2}
PLAIN_ARM, KL_ONLY, BOTH = "plain (no KL)", "KL 1e-6", "KL 1e-6, LPIPS, adversarial"
ARMS = {
    PLAIN_ARM: PLAIN | {"autoencoder.loss.kl": 0.0},
    KL_ONLY: PLAIN,
    "KL 1e-3": PLAIN | {"autoencoder.loss.kl": 1e-3},
    "KL 1e-1": PLAIN | {"autoencoder.loss.kl": 1e-1},
    "VQ": PLAIN | {"autoencoder.type": "vq"},
    "KL 1e-6, LPIPS": PLAIN | LPIPS,
    "KL 1e-6, adversarial": PLAIN | ADVERSARIAL,
    BOTH: PLAIN | LPIPS | ADVERSARIAL,
}
BUDGETS = {  # steps of the autoencoder, of the diffusion model, images
    "smoke": (4, 2, 10),
    "minutes": (600, 700, 250),
    "gpu": (5_000, 2_500, 5_000),
}
SHOWN = 8  # images of each column in the figure
TITLES = ("reconstructions", "decoded noise", "diffusion")


def plan(budget: str) -> list[tuple[str, int]]:
    return [(arm, 0) for arm in ((PLAIN_ARM, "VQ") if budget == "smoke" else ARMS)]


def measure(workspace: Workspace, arm: str, seed: int) -> Row:
    first, second, num = BUDGETS[workspace.budget]
    steps = {"autoencoder.steps": first, "autoencoder.loss.adversarial_start": first // 3, "diffusion.steps": second}
    smoke = {"autoencoder.loss.adversarial": 0.0} if workspace.budget == "smoke" else {}
    model, params = load(workspace.train(f"autoencoders/{arm}", steps | ARMS[arm] | smoke | {"seed": seed}))
    originals = measures.test_images(workspace)[: measures.NUM_RECONSTRUCTIONS]
    reconstructed = reconstruct(model, params, originals, measures.BATCHES[workspace.budget])
    sample = measures.make_sample(workspace, model, params, num)
    images = {
        "prior": decoded_noise(model, params, num, seed),
        "diffusion": sample(seed=seed, guidance=make_guidance(1.5)),
    }
    return {
        "steps": {"autoencoder": first, "diffusion": second},
        "cards": {"reconstructions": measures.reconstruction_cards(workspace, originals, reconstructed)}
        | {source: measures.cards(workspace, samples) for source, samples in images.items()},
        "images": {
            title: strips.encode(samples[:SHOWN])
            for title, samples in zip(TITLES, (reconstructed, images["prior"], images["diffusion"]))
        },
    }


def decoded_noise(model: LatentDiffusion, params: Params, num: int, seed: int) -> np.ndarray:
    """Images decoded from Gaussian noise with the mean and variance of the latents in each channel."""
    z = jax.random.normal(jax.random.key(seed), (num, *model.latent_shape))
    return make_sampler(model, num).decode(replicate(params), np.asarray(z))


def score(source: str, name: str):
    return lambda row: row["cards"][source][name]["value"]


def table(rows: Rows) -> str:
    return tables.by_arm(
        rows,
        {
            "PSNR": (score("reconstructions", "PSNR"), 1),
            "LPIPS": (score("reconstructions", "LPIPS-vgg16"), 3),
            "FD of reconstructions": (score("reconstructions", "rFD-VGG16"), 1),
            "FD of decoded noise": (score("prior", "FD-VGG16"), 1),
            "FD of diffusion": (score("diffusion", "FD-VGG16"), 1),
        },
    )


def answer(rows: Rows) -> str:
    def mean(arm: str, source: str, name: str = "FD-VGG16") -> str:
        return f"{tables.mean(rows, arm, score(source, name)):.1f}"

    best_prior, best = (
        min(tables.arms(rows), key=lambda arm, source=source: tables.mean(rows, arm, score(source, "FD-VGG16")))
        for source in ("prior", "diffusion")
    )
    text = (
        f"Decoded noise has FD {mean(PLAIN_ARM, 'prior')} with the plain autoencoder and {mean(best_prior, 'prior')} "
        f"with the best ({best_prior}). Samples of diffusion have FD {mean(PLAIN_ARM, 'diffusion')} on the latents of "
        f"the plain autoencoder and {mean(best, 'diffusion')} on those of the best ({best})."
    )
    if not {KL_ONLY, BOTH} <= set(tables.arms(rows)):
        return text
    kl_only, both = (
        f"FD {mean(arm, 'reconstructions', 'rFD-VGG16')}, PSNR {mean(arm, 'reconstructions', 'PSNR')}"
        for arm in (KL_ONLY, BOTH)
    )
    return f"{text} LPIPS and the discriminator change the reconstructions from {kl_only} to {both}."


def plot(rows: Rows) -> Figure:
    return strips.plot_grid([row["images"] for row in rows.values()], [row["arm"] for row in rows.values()], width=13)


EXPERIMENT = Experiment(
    Path(__file__).parent, "Does an autoencoder need a prior for its latent space to be useful?",
    plan, measure, table, answer, plot,
)  # fmt: skip

if __name__ == "__main__":
    runner.run(EXPERIMENT, __doc__)
