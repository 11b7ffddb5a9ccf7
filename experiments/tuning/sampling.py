"""How a trained run is best sampled: solver, steps and guidance, as our judge and VGG16 see the pictures.

    .venv/bin/python -m experiments.tuning.sampling --run=runs/fashion_mnist [--num=2000] [--data_dir=data] SETTING ...

A SETTING is SAMPLER:STEPS:GUIDANCE:FROM:TO, for example dpmpp_2m:12:1.75:0:1, guided between these shares of the
timesteps. Prints one line each; all share one compiled program.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from experiments.judge.run import open_court
from ldm_jax.evaluation.features import vgg16_features
from ldm_jax.evaluation.metrics import frechet_distance
from ldm_jax.pipeline import load as pipeline_load
from ldm_jax.runtime.parallel import replicate
from ldm_jax.runtime.xla import configure
from ldm_jax.sampling import generate, tables
from ldm_jax.sampling.generate import request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="SAMPLER:STEPS:GUIDANCE:FROM:TO")
    parser.add_argument("--run", type=Path, default=Path("runs/fashion_mnist"))
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    configure()
    court = open_court(args.data_dir)
    model = pipeline_load.load(args.run)
    extractor = vgg16_features(resize=model.config.evaluation.resize, batch_size=250)
    reference = extractor(court.test_set["x"])
    generator, params = generate.build_generator(model.config, 10, 200), replicate(model.params)
    for setting in args.settings:
        sampler, steps, guidance, *interval = setting.split(":")
        table = tables.build_table(model.config, sampler=sampler, steps=int(steps))
        interval = tuple(float(share) for share in interval)
        wanted = request(args.num, list(range(10)), guidance=float(guidance), seed=0, interval=interval)
        start = time.perf_counter()
        images = np.concatenate(list(generator.images(params, wanted, table)))
        rate = args.num / (time.perf_counter() - start)
        scores = court.scores(images, wanted.labels)
        scores["fd_vgg16"] = frechet_distance(extractor(images), reference)
        scores = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        print(f"{setting:>28}  {scores}  {rate:.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
