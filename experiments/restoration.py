"""What super_resolution and inpainting share: a model that is told a part of a picture, beside what needs no model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import measures, strips, tables
from experiments.frame import Experiment, Lab, Row, Rows
from ldm_jax.data import from_config as data_from_config
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.pipeline import model as pipeline_model
from ldm_jax.runtime.parallel import replicate
from ldm_jax.sampling import concat_inputs, generate
from ldm_jax.sampling import tables as sampling_tables
from ldm_jax.sampling.generate import request

DIFFUSION, AUTOENCODER = "diffusion", "autoencoder alone"
BUDGETS = {  # steps of the diffusion model, test pictures
    "smoke": (2, 20),
    "cpu": (8_000, 1_000),
    "gpu": (4_000, 5_000),
}
SHOWN, DRAWINGS = 12, 3  # pictures in the figure, and how often each is drawn
SCORES = {"rFD-VGG16": 1, "LPIPS-vgg16": 3, "PSNR": 1, "SSIM": 3}


def make_experiment(folder: Path, question: str, baseline: str, changes: dict[str, Any]) -> Experiment:
    """The experiment in `folder` on the model with these fields; `baseline` is what `given.baseline` does for it."""

    def plan(budget: str) -> list[tuple[str, int]]:
        return [(arm, 0) for arm in (baseline, DIFFUSION, AUTOENCODER)]

    def run_of(lab: Lab) -> Path:
        return lab.on_shared_latents(folder.name, changes | {"diffusion.steps": BUDGETS[lab.budget][0]})

    def measure(lab: Lab, arm: str, seed: int) -> Row:
        model, num = pipeline_load.load(run_of(lab)), BUDGETS[lab.budget][1]
        test_set = data_from_config.load_split(model.config, model.config.data.test_split)
        known = concat_inputs.from_split(model.config, test_set, num, seed)
        first = concat_inputs.from_split(model.config, test_set, SHOWN, seed)  # the same ones, hidden alike
        if arm == DIFFUSION:
            images = restoring(lab, model, known)(seed)
            again = restoring(lab, model, first)
            shown = {"given": concat_inputs.shown(model.config, first)}
            shown |= {f"drawing {1 + number}": again(seed + number) for number in range(DRAWINGS)}
            shown |= {"original": first.originals}
        else:
            restore = {
                baseline: lambda some: concat_inputs.baseline(model.config, some),
                AUTOENCODER: lambda some: pipeline_model.reconstructions(
                    model, some.originals, measures.BATCHES[lab.budget]
                ),
            }[arm]
            images, shown = restore(known), {arm: restore(first)}
        return {
            "cards": measures.reconstruction_cards(lab, known.originals, images),
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
        order = ["given", baseline, *(f"drawing {1 + number}" for number in range(DRAWINGS)), AUTOENCODER, "original"]
        return strips.grid([{"": shown[name]} for name in order], order, width=10)

    return Experiment(folder, question, plan, measure, table, answer, draw, run_of)


def restoring(lab: Lab, model: pipeline_model.Trained, known: concat_inputs.Given) -> Callable[[int], np.ndarray]:
    """restore(seed) -> uint8 [N, H, W, C]: one drawing of each picture, what is known of it put back."""
    num = len(known.originals)
    batch, config = min(measures.BATCHES[lab.budget], num), model.config
    generator = generate.build_generator(config, len(model.class_names), batch)
    params, table = replicate(model.params), sampling_tables.build_table(config)
    maps = generator.maps(params, known.known)
    labels = known.labels.tolist() if model.class_names else []
    fields = {"guidance": config.sampling.guidance, "interval": config.sampling.guidance_interval, "maps": maps}

    def restore(seed: int) -> np.ndarray:
        images = generator.images(params, request(num, labels, seed=seed, **fields), table)
        return concat_inputs.keep_known(known, np.concatenate(list(images)))

    return restore


def score(name: str) -> Callable[[Row], float]:
    return lambda row: row["cards"][name]["value"]


def table(rows: Rows) -> str:
    return tables.by_arm(rows, {name: (score(name), digits) for name, digits in SCORES.items()})
