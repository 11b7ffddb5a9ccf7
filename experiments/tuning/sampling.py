"""Scores of a trained run's samples by solver, steps and guidance: FD-VGG16, evaluation classifier, images per second.

    .venv/bin/python -m experiments.tuning.sampling --run=runs/fashion_mnist [--num=2000] [--data_dir=data] SETTING ...

A SETTING is SAMPLER:STEPS:GUIDANCE:FROM:TO, for example dpmpp_2m:12:1.75:0:1, with guidance in this interval of
t / T. Prints a line for each; all share one compiled program.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from experiments.judge.run import load_evaluation
from experiments.recipes import balanced_recipe, make_guidance
from ldm_jax.evaluation.features import vgg16_features
from ldm_jax.evaluation.metrics import frechet_distance
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.runtime.parallel import replicate
from ldm_jax.runtime.xla import configure
from ldm_jax.sampling.inputs import sample_inputs
from ldm_jax.sampling.recipe import Recipe, solving_defaults
from ldm_jax.sampling.sampler import make_sampler
from ldm_jax.sampling.tables import make_table

BATCH = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="SAMPLER:STEPS:GUIDANCE:FROM:TO")
    parser.add_argument("--run", type=Path, default=Path("runs/fashion_mnist"))
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    configure()
    evaluation = load_evaluation(args.data_dir)
    model, params = load(args.run)
    extractor = vgg16_features(resize=model.origin.config.evaluation.resize, batch_size=250)
    reference = extractor(evaluation.test_set["x"])
    sampler, params = make_sampler(model, BATCH), replicate(params)
    for setting in args.settings:
        recipe = recipe_of(setting, model, args.num)
        labels, inputs = sample_inputs(model, params, recipe, sampler)
        table, start = make_table(model, recipe.solving), time.perf_counter()
        images = np.concatenate(list(sampler.images(params, inputs, table)))
        rate = args.num / (time.perf_counter() - start)
        scores = evaluation.scores(images, labels) | {"fd_vgg16": frechet_distance(extractor(images), reference)}
        scores = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        print(f"{setting:>28}  {scores}  {rate:.0f} images/s", flush=True)


def recipe_of(setting: str, model: LatentDiffusion, num: int) -> Recipe:
    """The sampling recipe of a SETTING, for `num` samples."""
    sampler, steps, scale, first, last = setting.split(":")
    guidance = make_guidance(float(scale), (float(first), float(last)))
    return balanced_recipe(model, num, guidance=guidance, solving=solving_defaults(model, sampler, int(steps)))


if __name__ == "__main__":
    main()
