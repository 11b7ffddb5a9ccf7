"""Image restoration (super_resolution, inpainting): concat-conditioned diffusion and a baseline without a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import measures, strips, tables
from experiments.recipes import make_guidance
from experiments.runner import Experiment, Row, Rows, Workspace
from ldm_jax.data.from_config import load_split
from ldm_jax.evaluation.scoring import reconstruct
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.sampling import concat_inputs
from ldm_jax.sampling.concat_inputs import ConcatImages

DIFFUSION, AUTOENCODER = "diffusion", "autoencoder alone"
BUDGETS = {  # steps of the diffusion model, test images
    "smoke": (2, 20),
    "minutes": (8_000, 1_000),
    "gpu": (4_000, 5_000),
}
SHOWN, SAMPLES = 12, 3  # images in the figure, and samples of each
SCORES = {"rFD-VGG16": 1, "LPIPS-vgg16": 3, "PSNR": 1, "SSIM": 3}


def make_experiment(folder: Path, question: str, baseline: str, changes: dict[str, Any]) -> Experiment:
    """The experiment in `folder` on a model with the config fields in `changes`; `baseline` is the arm's name of
    `concat_inputs.baseline`."""

    def plan(budget: str) -> list[tuple[str, int]]:
        return [(arm, 0) for arm in (baseline, DIFFUSION, AUTOENCODER)]

    def run_of(workspace: Workspace) -> Path:
        return workspace.on_shared_latents(folder.name, changes | {"diffusion.steps": BUDGETS[workspace.budget][0]})

    def measure(workspace: Workspace, arm: str, seed: int) -> Row:
        (model, params), num = load(run_of(workspace)), BUDGETS[workspace.budget][1]
        config = model.origin.config
        test_set = load_split(config, config.data.test_split)
        inputs, shown_inputs = (  # equal in the first SHOWN images, which are degraded alike
            concat_inputs.from_split(model, test_set, count, seed, config.evaluation.batch_size)
            for count in (num, SHOWN)
        )
        if arm == DIFFUSION:
            images = make_restore(workspace, model, params, inputs)(seed)
            restore = make_restore(workspace, model, params, shown_inputs)
            shown = {"input": concat_inputs.visualize(model, shown_inputs)}
            shown |= {f"sample {1 + number}": restore(seed + number) for number in range(SAMPLES)}
            shown |= {"original": shown_inputs.originals}
        else:
            restore = {
                baseline: lambda inputs: concat_inputs.baseline(model, inputs),
                AUTOENCODER: lambda inputs: reconstruct(
                    model, params, inputs.originals, measures.BATCHES[workspace.budget]
                ),
            }[arm]
            images, shown = restore(inputs), {arm: restore(shown_inputs)}
        return {
            "cards": measures.reconstruction_cards(workspace, inputs.originals, images),
            "images": {name: strips.encode(strip) for name, strip in shown.items()},
        }

    def answer(rows: Rows) -> str:
        model, reference = (
            {name: tables.mean(rows, arm, score(name)) for name in SCORES} for arm in (DIFFUSION, baseline)
        )
        better = all(model[name] < reference[name] for name in ("LPIPS-vgg16", "rFD-VGG16"))
        return (
            f"{'Yes' if better else 'No'}: LPIPS {model['LPIPS-vgg16']:.3f} ({baseline}: "
            f"{reference['LPIPS-vgg16']:.3f}), FD {model['rFD-VGG16']:.1f} "
            f"({reference['rFD-VGG16']:.1f}), PSNR {model['PSNR']:.1f} dB ({reference['PSNR']:.1f} dB)."
        )

    def plot(rows: Rows) -> Figure:
        shown = {name: strip for row in rows.values() for name, strip in row["images"].items()}
        order = ["input", baseline, *(f"sample {1 + number}" for number in range(SAMPLES)), AUTOENCODER, "original"]
        return strips.plot_grid([{"": shown[name]} for name in order], order, width=10)

    return Experiment(folder, question, plan, measure, table, answer, plot, run_of)


def make_restore(
    workspace: Workspace, model: LatentDiffusion, params: Params, inputs: ConcatImages
) -> Callable[[int], np.ndarray]:
    """Makes restore(seed) -> uint8 [N, H, W, C]: one sample of each image, with its unmasked pixels pasted back."""
    sample = measures.make_sample(workspace, model, params, len(inputs.originals), concat_images=inputs)
    guidance = make_guidance(model.defaults.guidance, model.defaults.guidance_interval)
    return lambda seed: concat_inputs.paste_known(inputs, sample(seed=seed, guidance=guidance))


def score(name: str) -> Callable[[Row], float]:
    return lambda row: row["cards"][name]["value"]


def table(rows: Rows) -> str:
    return tables.by_arm(rows, {name: (score(name), digits) for name, digits in SCORES.items()})
