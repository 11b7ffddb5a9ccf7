"""Scores of a trained run's samples by solver, steps and guidance: FD-VGG16, recall, evaluation classifier, images/s.

    .venv/bin/python -m experiments.tuning.sampling --run=runs/fashion_mnist [--num=2000] [--data_dir=data] SETTING ...

A SETTING is SAMPLER:STEPS:GUIDANCE:FROM:TO, for example dpmpp_2m:12:1.75:0:1, with guidance in this interval of
t / T; SAMPLER/SPACING, for example unipc/beta, has that spacing of the timesteps. Prints a line for each; all share one
compiled program. A sixth part is the weaker model of autoguidance, RUN or
RUN@STEP or @STEP of the run itself, which takes the place of the null condition; a seventh, `null`, gives it that.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from experiments.judge.run import load_evaluation
from experiments.recipes import balanced_recipe, make_guidance
from ldm_jax.evaluation.features import vgg16_features
from ldm_jax.evaluation.metrics import frechet_distance, precision_recall
from ldm_jax.pipeline.load import load
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.runtime.parallel import replicate
from ldm_jax.runtime.xla import configure
from ldm_jax.sampling.guidance_models import guidance_models
from ldm_jax.sampling.inputs import sample_inputs
from ldm_jax.sampling.recipe import Recipe, solving_defaults
from ldm_jax.sampling.tables import make_table

BATCH = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="SAMPLER[/SPACING]:STEPS:GUIDANCE:FROM:TO[:RUN[@STEP][:null]]")
    parser.add_argument("--run", type=Path, default=Path("runs/fashion_mnist"))
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    configure()
    evaluation = load_evaluation(args.data_dir)
    model, params = load(args.run)
    extractor = vgg16_features(resize=model.origin.config.evaluation.resize, batch_size=250)
    reference = extractor(evaluation.test_set["x"])
    for setting in args.settings:
        recipe = recipe_of(setting, model, args.num)
        guides = guidance_models(recipe, model, params)
        sampler, replicated = guides.sampler(model, BATCH), replicate({**params, **guides.params})
        labels, inputs = sample_inputs(model, replicated, recipe, sampler)
        table, start = make_table(model, recipe.solving), time.perf_counter()
        images = np.concatenate(list(sampler.images(replicated, inputs, table)))
        rate = args.num / (time.perf_counter() - start)
        features = extractor(images)
        precision, recall = precision_recall(features, reference)
        scores = evaluation.scores(images, labels) | {"fd_vgg16": frechet_distance(features, reference)}
        scores |= {"precision": precision, "recall": recall}
        scores = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        print(f"{setting:>28}  {scores}  {rate:.0f} images/s", flush=True)


def recipe_of(setting: str, model: LatentDiffusion, num: int) -> Recipe:
    """The sampling recipe of a SETTING, for `num` samples."""
    solver, steps, scale, first, last, *weaker = setting.split(":")
    sampler, _, spacing = solver.partition("/")
    guidance = make_guidance(float(scale), (float(first), float(last)))._replace(
        guide_model=weaker[0] if weaker else None, guide_null=weaker[1:] == ["null"]
    )
    solving = solving_defaults(model, sampler, int(steps))
    return balanced_recipe(model, num, guidance=guidance, solving=solving._replace(spacing=spacing or solving.spacing))


if __name__ == "__main__":
    main()
