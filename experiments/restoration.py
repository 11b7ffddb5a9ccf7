"""What super_resolution and inpainting share: a model with concat conditioning, beside what needs no model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import measures, strips, tables
from experiments.frame import Experiment, Lab, Row, Rows
from experiments.recipes import guided
from ldm_jax.data.from_config import load_split
from ldm_jax.evaluation.scoring import reconstruct
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.sampling import concat_inputs
from ldm_jax.sampling.concat_inputs import ConcatImages

DIFFUSION, AUTOENCODER = "diffusion", "autoencoder alone"
BUDGETS = {  # steps of the diffusion model, test images
    "smoke": (2, 20),
    "cpu": (8_000, 1_000),
    "gpu": (4_000, 5_000),
}
SHOWN, SAMPLES = 12, 3  # images in the figure, and samples of each
SCORES = {"rFD-VGG16": 1, "LPIPS-vgg16": 3, "PSNR": 1, "SSIM": 3}


def make_experiment(folder: Path, question: str, baseline: str, changes: dict[str, Any]) -> Experiment:
    """The experiment in `folder` on the model with these fields; `baseline` is the name of `concat_inputs.baseline`."""

    def plan(budget: str) -> list[tuple[str, int]]:
        return [(arm, 0) for arm in (baseline, DIFFUSION, AUTOENCODER)]

    def run_of(lab: Lab) -> Path:
        return lab.on_shared_latents(folder.name, changes | {"diffusion.steps": BUDGETS[lab.budget][0]})

    def measure(lab: Lab, arm: str, seed: int) -> Row:
        (model, params), num = load(run_of(lab)), BUDGETS[lab.budget][1]
        config = model.origin.config
        test_set = load_split(config, config.data.test_split)
        given, first = (  # the first ones are the same, degraded alike
            concat_inputs.from_split(model, test_set, some, seed, config.evaluation.batch_size) for some in (num, SHOWN)
        )
        if arm == DIFFUSION:
            images = restoring(lab, model, params, given)(seed)
            again = restoring(lab, model, params, first)
            shown = {"given": concat_inputs.visualize(model, first)}
            shown |= {f"drawing {1 + number}": again(seed + number) for number in range(SAMPLES)}
            shown |= {"original": first.originals}
        else:
            restore = {
                baseline: lambda some: concat_inputs.baseline(model, some),
                AUTOENCODER: lambda some: reconstruct(model, params, some.originals, measures.BATCHES[lab.budget]),
            }[arm]
            images, shown = restore(given), {arm: restore(first)}
        return {
            "cards": measures.reconstruction_cards(lab, given.originals, images),
            "pictures": {name: strips.packed(some) for name, some in shown.items()},
        }

    def answer(rows: Rows) -> str:
        ours, theirs = ({name: tables.mean(rows, arm, score(name)) for name in SCORES} for arm in (DIFFUSION, baseline))
        better = ours["LPIPS-vgg16"] < theirs["LPIPS-vgg16"] and ours["rFD-VGG16"] < theirs["rFD-VGG16"]
        return (
            f"{'Yes' if better else 'No'}: LPIPS is {ours['LPIPS-vgg16']:.3f} against {theirs['LPIPS-vgg16']:.3f} of "
            f"{baseline}, FD {ours['rFD-VGG16']:.1f} against {theirs['rFD-VGG16']:.1f}, PSNR {ours['PSNR']:.1f} dB "
            f"against {theirs['PSNR']:.1f}."
        )

    def draw(rows: Rows) -> Figure:
        shown = {name: strip for row in rows.values() for name, strip in row["pictures"].items()}
        order = ["given", baseline, *(f"drawing {1 + number}" for number in range(SAMPLES)), AUTOENCODER, "original"]
        return strips.grid([{"": shown[name]} for name in order], order, width=10)

    return Experiment(folder, question, plan, measure, table, answer, draw, run_of)


def restoring(lab: Lab, model: LatentDiffusion, params: Params, given: ConcatImages) -> Callable[[int], np.ndarray]:
    """restore(seed) -> uint8 [N, H, W, C]: one sample of each image, its known part put back."""
    sample = measures.sampling(lab, model, params, len(given.originals), concat_images=given)
    guidance = guided(model.defaults.guidance, model.defaults.guidance_interval)
    return lambda seed: concat_inputs.paste_known(given, sample(seed=seed, guidance=guidance))


def score(name: str) -> Callable[[Row], float]:
    return lambda row: row["cards"][name]["value"]


def table(rows: Rows) -> str:
    return tables.by_arm(rows, {name: (score(name), digits) for name, digits in SCORES.items()})
