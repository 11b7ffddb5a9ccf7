"""Does an autoencoder need a prior for its latent space to be of use? And what do the terms of its loss buy?

    python experiments/autoencoders/run.py [--budget=smoke|cpu|gpu]

A plain autoencoder, VAEs at several weights of the KL, a VQ-VAE; with LPIPS, the patch discriminator and both. Of each:
how well it reconstructs test images, what it decodes of Gaussian noise, what a diffusion model on its latents samples.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments import frame, measures, strips, tables
from experiments.frame import Experiment, Lab, Row, Rows
from experiments.recipes import guided
from ldm_jax.evaluation.scoring import reconstruct
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling.sampler import make_sampler

PLAIN = {"autoencoder.loss.perceptual": 0.0, "autoencoder.loss.adversarial": 0.0}
LPIPS = {"autoencoder.loss.perceptual": 0.5, "autoencoder.loss.perceptual_every": 8}
ADVERSARIAL = {"autoencoder.loss.adversarial": 0.2}
PLAIN_ARM, BARE, BOTH = "plain (no KL)", "KL 1e-6", "KL 1e-6, LPIPS, adversarial"
ARMS = {
    PLAIN_ARM: PLAIN | {"autoencoder.loss.kl": 0.0},
    BARE: PLAIN,
    "KL 1e-3": PLAIN | {"autoencoder.loss.kl": 1e-3},
    "KL 1e-1": PLAIN | {"autoencoder.loss.kl": 1e-1},
    "VQ": PLAIN | {"autoencoder.type": "vq"},
    "KL 1e-6, LPIPS": PLAIN | LPIPS,
    "KL 1e-6, adversarial": PLAIN | ADVERSARIAL,
    BOTH: PLAIN | LPIPS | ADVERSARIAL,
}
BUDGETS = {  # steps of the autoencoder, of the diffusion model, images
    "smoke": (4, 2, 10),
    "cpu": (600, 700, 250),
    "gpu": (5_000, 2_500, 5_000),
}
SHOWN = 8  # images of each kind in the figure
TITLES = ("test pictures given back", "decoded noise", "diffusion")


def plan(budget: str) -> list[tuple[str, int]]:
    return [(arm, 0) for arm in ((PLAIN_ARM, "VQ") if budget == "smoke" else ARMS)]


def measure(lab: Lab, arm: str, seed: int) -> Row:
    first, second, num = BUDGETS[lab.budget]
    steps = {"autoencoder.steps": first, "autoencoder.loss.adversarial_start": first // 3, "diffusion.steps": second}
    smoke = {"autoencoder.loss.adversarial": 0.0} if lab.budget == "smoke" else {}
    model, params = load(lab.train(f"autoencoders/{arm}", steps | ARMS[arm] | smoke | {"seed": seed}))
    originals = measures.reference(lab)[: measures.RECONSTRUCTED]
    reconstructed = reconstruct(model, params, originals, measures.BATCHES[lab.budget])
    sample = measures.sampling(lab, model, params, num)
    images = {
        "prior": decoded_noise(model, params, num, seed),
        "diffusion": sample(seed=seed, guidance=guided(1.5)),
    }
    return {
        "steps": {"autoencoder": first, "diffusion": second},
        "cards": {"reconstructions": measures.reconstruction_cards(lab, originals, reconstructed)}
        | {kind: measures.cards(lab, samples) for kind, samples in images.items()},
        "pictures": {
            title: strips.packed(some[:SHOWN])
            for title, some in zip(TITLES, (reconstructed, images["prior"], images["diffusion"]))
        },
    }


def decoded_noise(model: LatentDiffusion, params: Params, num: int, seed: int) -> np.ndarray:
    """Images of latents from the Gaussian with the mean and the variance that the latents have in each channel."""
    z = jax.random.normal(jax.random.key(seed), (num, *model.latent_shape))
    return make_sampler(model, num).decode(replicate(params), np.asarray(z))


def score(kind: str, name: str):
    return lambda row: row["cards"][kind][name]["value"]


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
    def fd(arm: str, kind: str, name: str = "FD-VGG16") -> str:
        return f"{tables.mean(rows, arm, score(kind, name)):.1f}"

    best_prior, best = (
        min(tables.arms(rows), key=lambda arm, kind=kind: tables.mean(rows, arm, score(kind, "FD-VGG16")))
        for kind in ("prior", "diffusion")
    )
    told = (
        f"Decoded noise has FD {fd(PLAIN_ARM, 'prior')} with the plain autoencoder and {fd(best_prior, 'prior')} with "
        f"the best ({best_prior}). Diffusion draws with FD "
        f"{fd(PLAIN_ARM, 'diffusion')} on the latents of the plain one, and {fd(best, 'diffusion')} on those of the "
        f"best ({best})."
    )
    if not {BARE, BOTH} <= set(tables.arms(rows)):
        return told
    bare, both = (
        f"FD {fd(arm, 'reconstructions', 'rFD-VGG16')}, PSNR {fd(arm, 'reconstructions', 'PSNR')}"
        for arm in (BARE, BOTH)
    )
    return f"{told} LPIPS and the discriminator take what is given back from {bare} to {both}."


def draw(rows: Rows) -> Figure:
    return strips.grid([row["pictures"] for row in rows.values()], [row["arm"] for row in rows.values()], width=13)


EXPERIMENT = Experiment(
    Path(__file__).parent, "Does an autoencoder need a prior for its latent space to be of use?",
    plan, measure, table, answer, draw,
)  # fmt: skip

if __name__ == "__main__":
    frame.run(EXPERIMENT, __doc__)
